"""Where tokens that leave go on as one."""

from torch import fx

from tokenprune.rewrite.kept.gathered import Gathered
from tokenprune.rewrite.kept.masked import Masked
from tokenprune.rewrite.kept.protocol import StagePoint
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.stages import fuse_gathered, fuse_masked

__all__ = ["FusedGathered", "FusedMasked"]


class FusedGathered(Gathered):
    """On the gather path."""

    choice = staticmethod(fuse_gathered)


class FusedMasked(Masked):
    """On the mask path: the fused token stands in one row, and its members are hidden."""

    def left(self, rw: Rewrite, stage: StagePoint, logits: fx.Node, decision: fx.Node) -> fx.Node:
        how = (logits, decision, self.present(rw, stage), rw.num_prefix)
        return rw.insert(stage.at, fuse_masked, stage.tokens, *how)
