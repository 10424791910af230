"""The gather path: dropped tokens leave, the same number of every image."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, fx

from tokenprune.ops.moving import gather_table, put_back
from tokenprune.rewrite.kept.protocol import Selecting, StagePoint
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.stages import present_gathered, select_gathered

__all__ = ["Gathered"]


class Gathered(Selecting):
    """`kept` holds the original numbers [B, K] of the tokens that are left, ascending."""

    name = "gather"
    seen = staticmethod(present_gathered)
    table_gather = staticmethod(gather_table)
    restore = staticmethod(put_back)

    choice: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(select_gathered)

    def select(self, rw: Rewrite, stage: StagePoint, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
        how = (stage.previous, rw.settings, stage.number, rw.num_prefix, rw.real_patches())
        chosen = rw.insert(stage.at, type(self).choice, stage.tokens, logits, *how)
        left, kept = (rw.item(stage.at, chosen, place) for place in range(2))
        return left, kept
