"""Bypass mode for hosts that keep a grid (Swin): attention stays dense, only the MLP is split."""

import operator
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from tokenprune.analysis.tails import Grid, Region
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.bypass import (
    choose_branch,
    flat_tokens,
    kept_rows,
    merge_branches,
    take_tokens,
)
from tokenprune.ops.packing import merge_packed, pack, take_packed
from tokenprune.rewrite.rewrite import PREDICTORS, Pass, Rewrite
from tokenprune.rewrite.stages import forced_set, gather_stage, mask_stage, policy_of, ragged_stage

__all__ = ["BYPASSES", "BypassGather", "BypassMask", "BypassRagged"]

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
        **more: fx.Node,
    ) -> fx.Node:
        with rewrite.graph.inserting_before(marker):
            predictor = rewrite.graph.get_attr(f"{PREDICTORS}.{stage}")
        prefix = rewrite.plan.num_prefix_tokens
        # no earlier decision is handed on: in this mode a token may come back
        return rewrite.insert(
            marker, run, predictor, tokens, None, rewrite.context, stage, prefix, **more
        )

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

    take: Callable[..., object] = staticmethod(take_tokens)
    merge: Callable[..., object] = staticmethod(merge_branches)

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
            kept = rewrite.insert(users[0], self.take, read, chosen, layout)
            for node in users:
                node.replace_input_with(read, kept)
        merged = rewrite.insert(total, self.merge, source, branch, chosen, bypass, region.layout)
        total.replace_input_with(branch, merged)


class BypassRagged(BypassGather):
    """The same where images keep different numbers of tokens: those of the whole batch share rows.

    A region must not read anything else that belongs to one image.
    """

    take = staticmethod(take_packed)
    merge = staticmethod(merge_packed)

    def requires(self, rewrite: Rewrite) -> None:
        for region in self.regions.values():
            outside = {used for node in region.inside for used in node.all_input_nodes}
            for node in outside - region.inside - region.reads.keys():
                if rewrite.fold(rewrite.copy_of(node)) is not None:
                    raise UnsupportedHostError(
                        f"{rewrite.where(node)} belongs to one image and is read by a part that "
                        "tokens bypass, so images cannot keep different numbers of tokens there. "
                        "Use `selection: topk` for this host."
                    )

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[tuple[fx.Node, fx.Node], fx.Node]:
        forced = rewrite.insert(marker, forced_set, rewrite.context, stage)
        result = self._call(rewrite, ragged_stage, marker, tokens, stage, forced=forced)
        numbers, logits = (rewrite.insert(marker, operator.getitem, result, i) for i in (1, 2))
        prefix = rewrite.plan.num_prefix_tokens
        return (logits, numbers), rewrite.insert(marker, pack, numbers, tokens, prefix)
