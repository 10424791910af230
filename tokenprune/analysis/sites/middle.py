"""The middle of a block: after the residual sum of its attention (EViT, ToMe, DiffRate)."""

from torch import fx

from tokenprune.analysis.blocks import Attention, Block, Blocks, mark_tokens
from tokenprune.errors import PlanError
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Middle"]


class Middle:
    """Between attention and feed-forward; the nearest attention is the block's own."""

    name = "middle"

    def mark(self, traced: HostGraph, block: Block) -> fx.Node:
        if block.middle is None:
            raise PlanError(
                f"Block {block.number} ('{block.path}') has no middle: no sum of its tokens and an "
                "attention was found whose result is all that its feed-forward part reads "
                "(parallel branches have none). Use `place: entry`."
            )
        readers = list(block.middle.users)
        return mark_tokens(traced, block.middle, block.number, readers, block.middle.next)

    def attention(self, blocks: Blocks, block: Block) -> tuple[Attention | None, str]:
        return block.attention, f"block {block.number}"
