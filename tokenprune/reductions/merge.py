"""Merge: similar tokens become one, their mean (ToMe, Bolya et al., 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune.reductions.at_middles import AtMiddles
from tokenprune.reductions.protocol import MODES, Proof
from tokenprune.rewrite.counts import CountRealTokens
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.kept import MERGED_SETS, KeptSet
from tokenprune.rewrite.mix import HideDropped
from tokenprune.rewrite.outputs import RestoreOutputs
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.select import SelectAtSites
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.tables import GatherAligned, KeepTablesWhole, ResizeTables
from tokenprune.scorers import Matcher, Scorer

__all__ = ["Merge"]


@MODES.register("merge")
class Merge(AtMiddles):
    """Needs no training: a token that stands for n counts as n in attention and in means."""

    name: ClassVar[str] = "merge"
    nested: ClassVar[bool] = True
    removes: ClassVar[bool] = True
    hides: ClassVar[bool] = False
    keeps_last: ClassVar[bool] = False
    in_words: ClassVar[str] = "similar tokens are merged"
    tag: ClassVar[str] = "token-merging"
    defaults: ClassVar[Mapping[str, str]] = {"scorer": "similarity", "place": "middle"}
    scorers: ClassVar[tuple[type, ...]] = (Matcher,)
    kept_sets: ClassVar[Mapping[PathName, KeptSet]] = MERGED_SETS
    proofs: ClassVar[tuple[Proof, ...]] = (
        Proof("merged = expanded on random groups", "expanded", "gather"),
    )

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        emit = Emit(tokens_allowed=restore is not None, layout=self.final_layout)
        if path == "dense":
            return [Emit(tokens_allowed=True, layout=self.final_layout)]
        kept = self.kept_sets[path]
        select = SelectAtSites(kept, scorer, tokens_leave=True)
        if not kept.removes:
            return [select, GatherAligned(kept), emit]
        tables = (ResizeTables(kept), HideDropped(kept), GatherAligned(kept))
        whole = RestoreOutputs(kept, outputs=bool(restore))
        outputs = (whole,) if restore or self.analysis.stretches else ()
        return [KeepTablesWhole(), select, CountRealTokens(), *tables, *outputs, emit]

    def forced(self, sets: Sequence[Tensor], num_patches: Sequence[int]) -> Mapping[str, Any]:
        """Groups that random kept sets stand for: each patch joins one of them by its number, and
        every other one the first, so that sizes differ."""
        groups, rows = list[Tensor](), None
        for stage, (kept, patches) in enumerate(zip(sets, num_patches, strict=True)):
            rows = None if stage in self.analysis.starts else rows
            everyone = torch.arange(patches, device=kept.device).expand(kept.shape[0], -1)
            now = everyone if rows is None else rows
            joins = kept.gather(1, (now * 7 + 3) % kept.shape[1] * (now % 2))
            stays = torch.zeros_like(everyone).scatter(1, kept, 1) > 0
            group = torch.where(stays, everyone, joins)
            group = group if rows is None else group.gather(1, rows)
            groups.append(group)
            rows = group
        return {"groups": tuple(groups)}
