"""Bypass mode for hosts that keep a grid (Swin): attention stays dense, only the MLP is split."""

import operator
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from tokenprune.ops.bypass import (
    choose_branch,
    flat_tokens,
    kept_rows,
    merge_branches,
    take_tokens,
)
from tokenprune.passes.base import PREDICTORS, Pass, Rewrite
from tokenprune.regions import Grid, Region
from tokenprune.stages import gather_stage, mask_stage, policy_of

__all__ = ["BYPASSES", "BypassGather", "BypassMask"]

BYPASSES = "token_bypasses"


class _Bypass(Pass):
    """What both paths share: a selection at each stage, and an edit of each block's region.

    Args:
        grids: The tokens that each stage sees.
        regions: Block -> what dropped tokens go around there.
    """

    def __init__(self, grids: Sequence[Grid], regions: Mapping[int, Region]) -> None:
        self.grids, self.regions = grids, regions

    def apply(self, rewrite: Rewrite) -> None:
        chosen: list[fx.Node] = []
        for stage in rewrite.traced.markers:
            marker = rewrite.marker(stage)
            tokens = rewrite.insert(marker, flat_tokens, marker.args[0], self.grids[stage].layout)
            record, rows = self._select(rewrite, marker, tokens, stage)
            rewrite.records.append(record)
            chosen.append(rows)
        for block, region in self.regions.items():
            with rewrite.graph.inserting_before(rewrite.copy_of(region.total)):
                bypass = rewrite.graph.get_attr(f"{BYPASSES}.{block}")
            self._edit(rewrite, region, bypass, chosen[region.stage])

    def _call(
        self,
        rewrite: Rewrite,
        run: Callable[..., object],
        marker: fx.Node,
        tokens: fx.Node,
        stage: int,
    ) -> fx.Node:
        with rewrite.graph.inserting_before(marker):
            predictor = rewrite.graph.get_attr(f"{PREDICTORS}.{stage}")
        prefix = rewrite.plan.num_prefix_tokens
        # no earlier decision is handed on: in this mode a token may come back
        return rewrite.insert(marker, run, predictor, tokens, None, rewrite.context, stage, prefix)

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[tuple[fx.Node, fx.Node], fx.Node]:
        """The stage's record, and what says which tokens take the branch."""
        raise NotImplementedError

    def _edit(self, rewrite: Rewrite, region: Region, bypass: fx.Node, chosen: fx.Node) -> None:
        raise NotImplementedError


class BypassMask(_Bypass):
    """Both branches for every token; the decision chooses."""

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[tuple[fx.Node, fx.Node], fx.Node]:
        result = self._call(rewrite, mask_stage, marker, tokens, stage)
        logits, decision = (rewrite.insert(marker, operator.getitem, result, i) for i in range(2))
        prefix = rewrite.plan.num_prefix_tokens
        return (logits, decision), rewrite.insert(marker, policy_of, decision, prefix)

    def _edit(self, rewrite: Rewrite, region: Region, bypass: fx.Node, chosen: fx.Node) -> None:
        source, branch, total = map(rewrite.copy_of, (region.source, region.branch, region.total))
        poison = rewrite.insert(total, getattr, rewrite.context, "poison")
        merged = rewrite.insert(
            total, choose_branch, source, branch, chosen, bypass, region.layout, poison
        )
        total.replace_input_with(branch, merged)


class BypassGather(_Bypass):
    """The MLP for kept tokens only, the light branch for the others, both put back on the grid."""

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[tuple[fx.Node, fx.Node], fx.Node]:
        result = self._call(rewrite, gather_stage, marker, tokens, stage)
        kept, logits = (rewrite.insert(marker, operator.getitem, result, i) for i in (1, 2))
        prefix = rewrite.plan.num_prefix_tokens
        return (logits, kept), rewrite.insert(marker, kept_rows, kept, prefix)

    def _edit(self, rewrite: Rewrite, region: Region, bypass: fx.Node, chosen: fx.Node) -> None:
        source, branch, total = map(rewrite.copy_of, (region.source, region.branch, region.total))
        order = {node: number for number, node in enumerate(rewrite.graph.nodes)}
        inside = sorted(map(rewrite.copy_of, region.inside), key=order.__getitem__)
        for read, layout in region.reads.items():
            read = rewrite.copy_of(read)
            users = [node for node in inside if read in node.all_input_nodes]
            kept = rewrite.insert(users[0], take_tokens, read, chosen, layout)
            for node in users:
                node.replace_input_with(read, kept)
        merged = rewrite.insert(
            total, merge_branches, source, branch, chosen, bypass, region.layout
        )
        total.replace_input_with(branch, merged)
