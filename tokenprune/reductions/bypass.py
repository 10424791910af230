"""Bypass, for hosts that keep a grid (Swin): attention stays dense, only the MLP is split.

DynamicViT, T-PAMI version, section 3.5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from tokenprune.ops.moving import with_prefix
from tokenprune.ops.packing import merge_packed, pack, take_packed
from tokenprune.reductions.protocol import MODES, Reduction
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.kept import KEPT_SETS
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import POLICY, Rewrite
from tokenprune.rewrite.select import SelectAtSites
from tokenprune.rewrite.settings import PathName
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["BYPASSES", "Bypass", "light_branch"]

BYPASSES = "token_bypasses"
"""Where the light branches are: the first part of their state-dict keys."""

STEP = 0.2  # DynamicViT's for Swin: rho, rho - 0.2, rho - 0.4


def light_branch(
    dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Sequential:
    """What a dropped token goes through instead of the MLP: norm and one projection, near zero at
    first, so that it just keeps its value."""
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
    in_words: ClassVar[str] = "tokens that matter little skip the feed-forward parts"
    added: ClassVar[tuple[str, ...]] = (BYPASSES,)

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        super().__init__(root, analysis)
        found = (analysis.traced, analysis.blocks, analysis.plan, analysis.grids)
        self.tails = find_tails(root, *found)

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        """See `Reduction.candidates`: those on the grid that has most of them."""
        grids = prunable_blocks(root, traced, blocks, spec.prefix)
        needed = "a block with a branch that tokens can go around"
        return max(grids.values(), key=len, default=[]), needed

    @classmethod
    def ratios(cls, keep_ratio: float, stages: int, patches: int) -> list[float]:
        """r, r - 0.2, r - 0.4, as published; half of the one before where that would be less."""
        return [max(keep_ratio - STEP * s, keep_ratio * 0.5**s) for s in range(stages)]

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        """See `Reduction.passes`; every token stays in the outputs."""
        emit = Emit(tokens_allowed=True, layout=self.final_layout)
        if path == "dense":
            return [emit]
        select = SelectAtSites(KEPT_SETS[path], scorer, tokens_leave=False)
        light = {f"{BYPASSES}.{block}": tail for block, tail in self.tails.items()}
        return [select, SplitTails(list(light.items()), SPLITS[path]), emit]

    def modules(self, **like: Any) -> Mapping[str, nn.Module]:
        """See `Reduction.modules`: a light branch for each block that has a tail."""
        widths = [grid.num_channels for grid in self.analysis.grids]
        branches = {str(b): light_branch(widths[t.stage], **like) for b, t in self.tails.items()}
        return {BYPASSES: nn.ModuleDict(branches)}

    def tokens_in(self, budget: Budget) -> Mapping[int, int]:
        counts = budget.counts(self.analysis.num_patches)
        return {block: counts[tail.stage] for block, tail in self.tails.items()}


class Split(NamedTuple):
    """How one path runs a tail for kept tokens and the light branch for the others.

    Attributes:
        choose: (kept, P) -> what says which tokens are kept; (kept, tokens, P) if `images_share`.
        take: (tensor, chosen, layout) -> its kept tokens; None where the tail runs on all tokens.
        merge: (source, branch, chosen, bypass, layout) -> both branches on the grid.
        images_share: Kept tokens of all images share rows.
    """

    choose: Callable[..., object]
    take: Callable[..., object] | None
    merge: Callable[..., object]
    images_share: bool = False


SPLITS: dict[PathName, Split] = {
    "mask": Split(policy_of, None, choose_branch),
    "gather": Split(with_prefix, take_tokens, merge_branches),
    "jagged": Split(pack, take_packed, merge_packed, images_share=True),
}


@dataclass
class SplitTails(Pass):
    """Run tails for kept tokens only; the others go through a light branch, or keep their value.

    Attributes:
        tails: Each with the name of its light branch, if it has one.
        split: How the path does it.
    """

    tails: Sequence[tuple[str | None, Tail]]
    split: Split

    def requires(self, rewrite: Rewrite) -> None:
        """Where images share rows, a tail must not read anything else that belongs to one image."""
        for _, tail in self.tails if self.split.images_share else ():
            outside = {used for node in tail.inside for used in node.all_input_nodes}
            for node in outside - tail.inside - tail.reads.keys():
                if rewrite.analysis.facts[node].rows_per_image is not None:
                    raise UnsupportedHostError(
                        f"{rewrite.where(rewrite.copy_of(node))} belongs to one image and is read "
                        "by a part that tokens bypass, so images cannot keep different numbers of "
                        "tokens there. Use `selection: topk` for this host."
                    )

    def apply(self, rewrite: Rewrite) -> None:
        chosen = []
        pairs = zip(rewrite.markers(), rewrite.records, strict=True)
        for stage, (marker, record) in enumerate(pairs):
            kept = (record.kept, record.entering) if self.split.images_share else (record.kept,)
            chosen.append(rewrite.insert(marker, self.split.choose, *kept, rewrite.num_prefix))
            if self.split.take is None:
                chosen[-1].meta[POLICY] = stage
        for light, tail in self.tails:
            source, branch, total = map(rewrite.copy_of, (tail.source, tail.branch, tail.total))
            bypass = None if light is None else rewrite.module(total, light)
            both = [source, branch, chosen[tail.stage], bypass, tail.layout]
            if self.split.take is None:
                both.append(rewrite.insert(total, getattr, rewrite.settings, "poison"))
            else:
                _take_kept(rewrite, tail, chosen[tail.stage], self.split.take)
            total.replace_input_with(branch, rewrite.insert(total, self.split.merge, *both))


def _take_kept(rw: Rewrite, tail: Tail, chosen: fx.Node, take: Callable[..., object]) -> None:
    """Let the tail read the kept tokens of each tensor that it reads."""
    inside = set(map(rw.copy_of, tail.inside))
    for origin, layout in tail.reads.items():
        read = rw.copy_of(origin)
        users = [n for n in rw.graph.nodes if n in inside and n in read.users]
        kept = rw.insert(users[0], take, read, chosen, layout)
        for node in users:
            node.replace_input_with(read, kept)
