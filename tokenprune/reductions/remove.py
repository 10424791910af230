"""Remove: dropped tokens leave, or are hidden from all others while training (DynamicViT)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.leaving import leaving_blocks
from tokenprune.hosts.spec import ArchSpec
from tokenprune.reductions.protocol import MODES, Reduction
from tokenprune.rewrite.counts import CountRealTokens
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.mix import HideDropped
from tokenprune.rewrite.outputs import BlankPadding, RestoreOutputs
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.select import SelectAtSites
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.tables import GatherAligned, KeepTablesWhole, ResizeTables
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Remove"]


@MODES.register("remove")
class Remove(Reduction):
    """Serves hosts whose tokens are one sequence, and a stretch of those that keep a grid."""

    name: ClassVar[str] = "remove"
    places: ClassVar[frozenset[str]] = frozenset({"entry", "middle"})
    nested: ClassVar[bool] = True
    removes: ClassVar[bool] = True
    skipped: ClassVar[int] = 1  # no block has looked yet at what leaves at block 0

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        return leaving_blocks(root, traced, blocks, spec), "two blocks"

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        if path == "dense":
            return [Emit(tokens_allowed=True, layout=self.final_layout)]
        kept, stretches = self.kept_sets[path], self.analysis.stretches
        select = (SelectAtSites(kept, scorer, tokens_leave=True), CountRealTokens())
        outputs: Pass = BlankPadding(kept)
        if restore or stretches:
            outputs = RestoreOutputs(kept, outputs=bool(restore))
        emit = Emit(tokens_allowed=restore is not None, layout=self.final_layout)
        if not kept.removes:
            return [*select, HideDropped(kept), outputs, emit]
        gather = (ResizeTables(kept), HideDropped(kept), GatherAligned(kept))
        return [KeepTablesWhole(), *select, *gather, outputs, emit]
