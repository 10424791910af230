"""Whole windows leave: each branch that attends in windows keeps the best of its own.

A stage scores tokens; the windows of each branch it decides for take the mean over their tokens. So
shifted windows and others have a set each, from the same scores. A stage records the windows of its
first branch, as a decision about tokens [B, N].
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tokenprune.analysis.facts import Aligned
from tokenprune.ops.moving import gather_table
from tokenprune.ops.selection import in_order, one_hot, select_topk
from tokenprune.ops.spread import with_spread_noise
from tokenprune.ops.windows import Windows, window_means, window_policy
from tokenprune.rewrite.kept.protocol import KeptSet, StagePoint
from tokenprune.rewrite.kept.pruning_trace import StageTrace
from tokenprune.rewrite.rewrite import POLICY, Rewrite
from tokenprune.rewrite.settings import CallSettings, PathName
from tokenprune.rewrite.stages import decide, forced_set, score
from tokenprune.scorers.protocol import as_keep_logits

__all__ = ["WindowSet", "windows_kept"]


def windows_kept(tokens: int, num_patches: int, windows: Windows) -> int:
    """K windows, for a budget of so many tokens: rounded up."""
    return -(-tokens * windows.number // num_patches)


def _asked(
    keep_logits: Tensor, settings: CallSettings, stage: int, windows: Windows
) -> tuple[Tensor, CallSettings]:
    """The scores of windows [B, n, 2], and what a call asks about them. A forced set of tokens
    forces the windows that hold most of it."""
    forced, patches = forced_set(settings, stage), keep_logits.shape[1]
    if forced is None:
        means, count = window_means(keep_logits, windows), windows.number
        if settings.num_keep:  # where decisions are drawn, there may be no number
            count = windows_kept(settings.num_keep[stage], patches, windows)
        return means, CallSettings(
            num_keep=(count,),
            sample=settings.sample,
            temperature=settings.temperature,
            hard=settings.hard,
            fixed=settings.fixed,
            spread=settings.spread,
            generator=settings.generator,
        )
    held = one_hot(forced, keep_logits[..., 0].detach())
    means = window_means(as_keep_logits(held), windows)
    count = windows_kept(forced.shape[1], patches, windows)
    return means, CallSettings((count,), sample=False)


def choose_windows(
    keep_logits: Tensor, settings: CallSettings, stage: int, windows: Windows
) -> Tensor:
    """The numbers of the windows that stay, [B, K], ascending."""
    logits, asked = _asked(keep_logits, settings, stage, windows)
    if asked.num_keep[0] == windows.number:
        everyone = torch.arange(windows.number, device=logits.device)
        return everyone.expand(logits.shape[0], -1)
    logits = with_spread_noise(logits) if asked.spread else logits
    return select_topk(logits, asked.num_keep[0])


def decide_windows(
    keep_logits: Tensor, settings: CallSettings, stage: int, windows: Windows
) -> Tensor:
    """The decision about every window, [B, n]."""
    logits, asked = _asked(keep_logits, settings, stage, windows)
    return decide(logits, None, asked, 0, None)


def take_rows(table: Tensor, kept: Tensor) -> Tensor:
    """The rows [B * K, ...] of kept windows, of a table [B * n, ...] of all."""
    batch, count = kept.shape
    first = torch.arange(batch, device=kept.device)[:, None] * (table.shape[0] // batch)
    every = table.shape[0] == batch * count
    return table if every else table.index_select(0, (kept + first).flatten())


def tokens_decided(kept: Tensor, windows: Windows, like: Tensor) -> Tensor:
    """What is kept, of `choose_windows` or `decide_windows`, as a decision about tokens [B, N]."""
    if not kept.is_floating_point():
        kept = one_hot(kept, like.new_zeros(like.shape[0], windows.number))
    return window_policy(kept, windows)


class WindowSet(KeptSet):
    """`kept` is a decision about tokens [B, N], on both paths.

    Args:
        name: Of the path.
        first: Stage -> the windows of the first branch that it decides for.

    Attributes:
        of_branch: Branch -> its kept windows: facts count branches where others count stages.
    """

    removes = False
    table_gather = staticmethod(gather_table)

    def __init__(self, name: PathName, first: Mapping[int, Windows] | None = None) -> None:
        self.name = name  # type: ignore[misc]
        self.first = first or {}
        self.of_branch: dict[int, fx.Node] = {}

    def choose(self, rw: Rewrite, stage: StagePoint) -> tuple[fx.Node, fx.Node, fx.Node]:
        given = (stage.scorer, stage.tokens, None, rw.num_prefix)
        logits = rw.insert(stage.at, score, *given, **stage.needed)
        windows = self.first[stage.number]
        kept = self._kept(rw, stage.at, logits, stage.number, windows)
        decision = rw.insert(stage.at, tokens_decided, kept, windows, logits)
        return stage.tokens, logits, decision

    def windows(self, rw: Rewrite, stage: int, windows: Windows) -> fx.Node:
        """The windows that a stage keeps where they lie like this: their numbers [B, K], or on the
        mask path a decision about each, [B, n]."""
        record = rw.records[stage]
        return self._kept(rw, record.kept, record.keep_logits, stage, windows)

    def policy_of(self, rw: Rewrite, stage: int, windows: Windows) -> fx.Node:
        """[B, N]: 1 at the tokens of windows that are kept where they lie like this, 0 elsewhere;
        on the mask path."""
        policy = rw.records[stage].kept
        if windows != self.first[stage]:
            kept, key = self.windows(rw, stage, windows), ("policy", stage, windows)
            policy = rw.once(key, rw.insert_after, kept, window_policy, kept, windows)
        policy.meta[POLICY] = stage
        return policy

    def _kept(
        self, rw: Rewrite, at: fx.Node, logits: fx.Node, stage: int, windows: Windows
    ) -> fx.Node:
        how = (logits, rw.settings, stage, windows)
        make = decide_windows if self.name == "mask" else choose_windows
        return rw.once(("windows", stage, windows), rw.insert, at, make, *how)

    def numbers(self, rw: Rewrite, stage: int) -> fx.Node:
        return self.of_branch[stage]

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        dims = tuple(aligned.dims)
        kept = self.of_branch[next(iter(aligned.dims.values())).stage]
        if aligned.folded:
            return rw.insert(at, take_rows, table, kept)
        how = (kept, dims, (0,) * len(dims), aligned.rank, aligned.rows_per_image)
        return rw.insert(at, gather_table, table, *how)

    def stage_traces(
        self, records: Sequence[Any], num_patches: Sequence[int], starts: Collection[int]
    ) -> list[StageTrace]:
        stages = []
        for logits, decision in records:
            kept = None
            if self.name == "gather":
                numbers = torch.arange(decision.shape[1], device=decision.device)
                kept = in_order(torch.where(decision > 0.5, numbers, -1))
                kept = kept[:, : max((kept >= 0).sum(1).tolist(), default=0)]
            count = decision.detach().sum(1).mean()
            stages.append(StageTrace(logits, decision, kept, count))
        return stages
