"""Merging: groups of patches become their mean, or every member of a group takes it.

Both paths compute one function, since attention to n equal tokens is attention to one of size n.
So they prove each other: `merged = expanded` needs no reference and finds every operator that does
not know of sizes.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tokenprune.ops import merging
from tokenprune.ops.matching import Groups, Pairs, as_groups
from tokenprune.ops.merging import Merged
from tokenprune.rewrite.kept.protocol import KeptSet, StagePoint
from tokenprune.rewrite.kept.pruning_trace import StageTrace
from tokenprune.rewrite.kept.token_ops import WEIGHTED
from tokenprune.rewrite.rewrite import POLICY, Rewrite
from tokenprune.rewrite.settings import CallSettings
from tokenprune.scorers.protocol import as_keep_logits

__all__ = ["ExpandedSet", "MergedSet"]


def merge_at(
    matcher: nn.Module,
    tokens: Tensor,
    before: Merged | None,
    settings: CallSettings,
    stage: int,
    num_prefix: int,
    real: Tensor | None,
    **needed: Any,
) -> tuple[Tensor, Merged, Groups | Pairs]:
    """The tokens [B, P + K, D] after a stage, what they stand for, and the groups of the N' patches
    that came in."""
    patches = tokens[:, num_prefix:]
    numbers = None if before is None else before.numbers
    if settings.groups is not None:
        groups = as_groups(settings.groups[stage].to(tokens.device), numbers)
    elif settings.num_keep[stage] == patches.shape[1]:
        places = torch.arange(patches.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        groups = Groups(places, places, torch.zeros_like(places, dtype=torch.float32))
    else:
        real = real if real is None or numbers is None else real.gather(1, numbers)
        count = settings.num_keep[stage]
        groups = matcher.match(patches, real, num_prefix, count, **needed)  # type: ignore[operator]
    left, merged = merging.merge_groups(tokens, groups, before, num_prefix)
    return left, merged, groups


def groups_of(settings: CallSettings, stage: int) -> Tensor:
    """The groups forced on a stage, [B, N]."""
    if settings.groups is None:
        raise RuntimeError("the expanded path runs on given groups")
    return settings.groups[stage]


class MergedSet(KeptSet):
    """`kept` is a `Merged`: fewer tokens, with sizes."""

    name = "gather"
    ops = WEIGHTED
    table_gather = staticmethod(merging.gather_merged)
    restore = staticmethod(merging.put_back_merged)

    def choose(self, rw: Rewrite, stage: StagePoint) -> tuple[fx.Node, fx.Node, fx.Node]:
        given = (stage.scorer, stage.tokens, stage.previous, rw.settings, stage.number)
        how = (rw.num_prefix, rw.real_patches())
        made = rw.insert(stage.at, merge_at, *given, *how, **stage.needed)
        left, kept, scores = (rw.item(stage.at, made, place) for place in range(3))
        return left, scores, kept

    def numbers(self, rw: Rewrite, stage: int) -> fx.Node:
        kept = rw.records[stage].kept
        return rw.once(("numbers", stage), rw.insert_after, kept, getattr, kept, "numbers")

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """Sizes; None where nothing was merged."""
        kept, key = rw.records[stage].kept, ("policy", stage, prefix, rows_per_image)
        how = (merging.sizes_along, kept, rw.num_prefix, prefix, rows_per_image)
        policy = rw.once(key, rw.insert_after, kept, *how)
        policy.meta[POLICY] = stage
        return policy

    def stage_traces(
        self, records: Sequence[Any], num_patches: Sequence[int], starts: Collection[int]
    ) -> list[StageTrace]:
        stages, before = [], None
        pairs = enumerate(zip(records, num_patches, strict=True))
        for stage, ((found, merged), patches) in pairs:
            before = None if stage in starts else before
            scores = as_keep_logits(found.score)  # here: most calls do not ask for a trace
            rows, numbers = merged.rows, merged.numbers
            spread = scores if before is None else scores.gather(1, _pairs(before.rows))
            decision = scores.new_zeros(scores.shape[0], patches).scatter(1, numbers, 1.0)
            groups = numbers.gather(1, rows)
            sizes = merged.sizes[:, -numbers.shape[1] :]
            count = numbers.shape[1]
            stages.append(StageTrace(spread, decision, numbers, count, groups, sizes))
            before = merged
        return stages


def _pairs(rows: Tensor) -> Tensor:
    return rows.unsqueeze(-1).expand(-1, -1, 2)


class ExpandedSet(KeptSet):
    """`kept` holds for each patch the number of the one that stands for it, [B, N]. The host runs
    untouched; tables are read at the places of those that stand for others, as merged ones are."""

    name = "expanded"
    removes = False
    table_gather = staticmethod(merging.gather_expanded)
    restore = staticmethod(merging.put_back_merged)

    def choose(self, rw: Rewrite, stage: StagePoint) -> tuple[fx.Node, fx.Node, fx.Node]:
        of = rw.insert(stage.at, groups_of, rw.settings, stage.number)
        left = rw.insert(stage.at, merging.expand_groups, stage.tokens, of, rw.num_prefix)
        return left, of, of
