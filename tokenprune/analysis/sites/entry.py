"""The entry of a block: its tokens as they come in (DynamicViT)."""

from torch import fx

from tokenprune.analysis.blocks import Attention, Block, Blocks
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Entry"]


class Entry:
    """Before everything in the block; the nearest attention is in the block before."""

    name = "entry"

    def mark(self, traced: HostGraph, block: Block) -> fx.Node:
        return block.entry

    def attention(self, blocks: Blocks, block: Block) -> tuple[Attention | None, str]:
        before = blocks.get(block.number - 1)
        return (before.attention if before else None), f"the block before block {block.number}"
