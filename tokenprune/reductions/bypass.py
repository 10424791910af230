"""Bypass, for hosts that keep a grid (Swin): attention stays dense, only the MLP is split.

DynamicViT, T-PAMI version, section 3.5.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.plan import Budget
from tokenprune.analysis.tails import Tail, find_tails, prunable_blocks
from tokenprune.errors import UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops.align import policy_of
from tokenprune.ops.bypass import choose_branch, merge_branches, take_tokens
from tokenprune.ops.layout import Layout
from tokenprune.ops.moving import with_prefix
from tokenprune.ops.packing import merge_packed, pack, take_packed
from tokenprune.reductions.protocol import MODES, Reduction
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.kept import KEPT_SETS
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite, StageRecord
from tokenprune.rewrite.select import SelectAtSites
from tokenprune.rewrite.settings import PathName
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["BYPASSES", "Bypass", "light_branch"]

BYPASSES = "token_bypasses"
"""Where the light branches are: the first part of their state-dict keys."""

# DynamicViT's for Swin: rho, rho - 0.2, rho - 0.4.
STEP = 0.2


def light_branch(
    dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """What a dropped token goes through instead of the MLP: norm and one projection.

    Starts near zero, so that a dropped token at first just keeps its value.
    """
    project = nn.Linear(dim, dim, device=device, dtype=dtype)
    nn.init.trunc_normal_(project.weight, std=0.02)
    nn.init.zeros_(project.bias)
    return nn.Sequential(nn.LayerNorm(dim, device=device, dtype=dtype), project)


@MODES.register("bypass")
class Bypass(Reduction):
    """Dropped tokens go around the per-token tail of each block, through a light branch.

    As in the published DynamicSwin, the decision of a stage replaces the one before.
    """

    name: ClassVar[str] = "bypass"
    nested: ClassVar[bool] = False
    removes: ClassVar[bool] = False
    added: ClassVar[tuple[str, ...]] = (BYPASSES,)

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        super().__init__(root, analysis)
        plan = analysis.plan
        self.tails = find_tails(
            root, analysis.traced, analysis.blocks, plan.blocks, analysis.grids, plan.num_prefix
        )

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        """See `Reduction.candidates`: those on the grid that has most of them."""
        grids = prunable_blocks(root, traced, blocks, spec.num_prefix_tokens)
        needed = "a block with a branch that tokens can go around"
        return max(grids.values(), key=len, default=[]), needed

    @classmethod
    def ratios(cls, keep_ratio: float, stages: int) -> list[float]:
        """r, r - 0.2, r - 0.4, as published; half of the one before where that would be less."""
        return [max(keep_ratio - STEP * s, keep_ratio * 0.5**s) for s in range(stages)]

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        """See `Reduction.passes`; every token stays in the outputs."""
        edits: list[Pass] = []
        if path != "dense":
            selected = SelectAtSites(KEPT_SETS[path], scorer, tokens_leave=False)
            edits = [selected, SplitTails(self.tails, SPLITS[path])]
        return [*edits, Emit(tokens_allowed=True, layout=self._final_layout())]

    def _final_layout(self) -> Layout:
        """As the tokens of the last stage lie, if the final ones are a grid too."""
        shape = self.analysis.final.meta["val"].shape
        rows = max(shape[0] // self.analysis.traced.batch_size, 1)
        return Layout(rows, self.analysis.grids[-1].layout.channels_first and len(shape) == 4)

    def modules(self, **like: Any) -> Mapping[str, nn.Module]:
        """See `Reduction.modules`: a light branch for each block that has a tail."""
        widths = [grid.num_channels for grid in self.analysis.grids]
        branches = {
            str(block): light_branch(widths[tail.stage], **like)
            for block, tail in self.tails.items()
        }
        return {BYPASSES: nn.ModuleDict(branches)}

    def tokens_in(self, budget: Budget) -> Mapping[int, int]:
        counts = budget.counts(self.analysis.num_patches)
        return {block: counts[tail.stage] for block, tail in self.tails.items()}


class Split(NamedTuple):
    """How one path runs a tail for kept tokens and the light branch for the others.

    Attributes:
        chosen: Puts in what says which tokens are kept, before a node.
        take: (tensor, chosen, layout) -> its kept tokens; None where the tail runs on all tokens.
        merge: (source, branch, chosen, bypass, layout) -> both branches on the grid.
        images_share: Kept tokens of all images share rows.
    """

    chosen: Callable[[Rewrite, fx.Node, StageRecord], fx.Node]
    take: Callable[..., object] | None
    merge: Callable[..., object]
    images_share: bool = False


def _policy(rw: Rewrite, at: fx.Node, record: StageRecord) -> fx.Node:
    return rw.insert(at, policy_of, record.kept, rw.num_prefix)


def _rows(rw: Rewrite, at: fx.Node, record: StageRecord) -> fx.Node:
    return rw.insert(at, with_prefix, record.kept, rw.num_prefix)


def _packed(rw: Rewrite, at: fx.Node, record: StageRecord) -> fx.Node:
    return rw.insert(at, pack, record.kept, record.entering, rw.num_prefix)


SPLITS: dict[PathName, Split] = {
    "mask": Split(_policy, None, choose_branch),
    "gather": Split(_rows, take_tokens, merge_branches),
    "jagged": Split(_packed, take_packed, merge_packed, images_share=True),
}


class SplitTails(Pass):
    """Run the tail of each block for kept tokens only, and the light branch for the others.

    Args:
        tails: Block -> its tail.
        split: How the path does it.
    """

    def __init__(self, tails: Mapping[int, Tail], split: Split) -> None:
        self.tails, self.split = tails, split

    def requires(self, rewrite: Rewrite) -> None:
        """Where images share rows, a tail must not read anything else that belongs to one image."""
        for tail in self.tails.values() if self.split.images_share else ():
            outside = {used for node in tail.inside for used in node.all_input_nodes}
            for node in outside - tail.inside - tail.reads.keys():
                if rewrite.analysis.facts[node].rows_per_image is not None:
                    raise UnsupportedHostError(
                        f"{rewrite.where(rewrite.copy_of(node))} belongs to one image and is read "
                        "by a part that tokens bypass, so images cannot keep different numbers of "
                        "tokens there. Use `selection: topk` for this host."
                    )

    def apply(self, rewrite: Rewrite) -> None:
        stages = zip(rewrite.markers(), rewrite.records, strict=True)
        chosen = [self.split.chosen(rewrite, marker, record) for marker, record in stages]
        for block, tail in self.tails.items():
            source, branch, total = map(rewrite.copy_of, (tail.source, tail.branch, tail.total))
            bypass = rewrite.module(total, f"{BYPASSES}.{block}")
            if self.split.take is not None:
                self._take_kept(rewrite, tail, chosen[tail.stage], self.split.take)
            more = []
            if self.split.take is None:
                more = [rewrite.insert(total, getattr, rewrite.settings, "poison")]
            merged = rewrite.insert(
                total,
                self.split.merge,
                source,
                branch,
                chosen[tail.stage],
                bypass,
                tail.layout,
                *more,
            )
            total.replace_input_with(branch, merged)

    def _take_kept(
        self, rewrite: Rewrite, tail: Tail, chosen: fx.Node, take: Callable[..., object]
    ) -> None:
        """Let the tail read the kept tokens of each tensor that it reads."""
        order = {node: number for number, node in enumerate(rewrite.graph.nodes)}
        inside = sorted(map(rewrite.copy_of, tail.inside), key=order.__getitem__)
        for origin, layout in tail.reads.items():
            read = rewrite.copy_of(origin)
            users = [node for node in inside if read in node.all_input_nodes]
            kept = rewrite.insert(users[0], take, read, chosen, layout)
            for node in users:
                node.replace_input_with(read, kept)
