"""Bypass mode for hosts that keep a grid (Swin): attention stays dense, only the MLP is split.

The MLP is found in the graph, not by name: in each block, the last residual sum `x + f(x)` whose
branch reads `x` alone, holds a linear layer and mixes nothing. So any hierarchical host is served.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.bypass import choose_branch, flat_tokens, merge_branches, take_tokens
from tokenprune.passes.base import PREDICTORS, Pass, Rewrite
from tokenprune.passes.mixers import mixes
from tokenprune.stages import gather_stage, mask_stage
from tokenprune.tracing.traced import Traced

__all__ = ["BYPASSES", "BypassGather", "BypassMask", "Region", "bypassed_blocks", "find_region"]

BYPASSES = "token_bypasses"
ADDS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})


@dataclass(frozen=True)
class Region:
    """The per-token branch of one block: `total = source + branch(source)`."""

    source: fx.Node
    branch: fx.Node
    total: fx.Node
    inside: frozenset[fx.Node]


def bypassed_blocks(traced: Traced) -> tuple[int, ...]:
    """Blocks from the first stage on that see the same grid; the last stage ends where it ends."""
    first = traced.markers[0]
    shape, blocks = first.meta["val"].shape, []
    for block, entry in traced.entries.items():
        if block >= cast(int, first.args[1]):
            if entry.meta["val"].shape != shape:
                break
            blocks.append(block)
    return tuple(blocks)


def find_region(root: nn.Module, traced: Traced, block: int) -> Region:
    """The MLP region of a block of the traced graph.

    Raises:
        UnsupportedHostError: The block has no residual branch that acts on each token alone.
    """
    entry, following = traced.entries[block], traced.entries.get(block + 1)
    nodes = list(traced.graph.nodes)
    first = nodes.index(entry)
    last = nodes.index(following) if following is not None else len(nodes)
    for total in reversed(nodes[first:last]):
        if total.target not in ADDS or len(total.args) < 2:
            continue
        for source, branch in (total.args[:2], total.args[1::-1]):
            if isinstance(source, fx.Node) and isinstance(branch, fx.Node):
                inside = _reading_only(source, branch, set(nodes[:first]))
                if inside and _is_mlp(root, inside) and _holds_all(source, entry):
                    return Region(source, branch, total, frozenset(inside))
    raise UnsupportedHostError(
        f"Block {block} has no residual branch that acts on each token alone (an MLP), so tokens "
        f"cannot bypass it. Found at {entry.meta['where']}."
    )


def _reading_only(source: fx.Node, branch: fx.Node, outside: set[fx.Node]) -> set[fx.Node] | None:
    """The nodes between `source` and `branch`; None if the branch reads anything else."""
    inside: set[fx.Node] = set()
    reached, queue = False, [branch]
    while queue:
        node = queue.pop()
        if node is source:
            reached = True
        elif node.op == "placeholder" or (node in outside and node.op != "get_attr"):
            return None
        elif node not in inside and node.op != "get_attr":
            inside.add(node)
            queue.extend(node.all_input_nodes)
    return inside if reached else None


def _holds_all(source: fx.Node, entry: fx.Node) -> bool:
    """Whether `source` holds the tokens that enter the block, as a sequence or a grid."""
    shapes = [node.meta["val"].shape for node in (source, entry)]
    return all(len(s) in (3, 4) for s in shapes) and len({s[1:-1].numel() for s in shapes}) == 1


def _is_mlp(root: nn.Module, inside: set[fx.Node]) -> bool:
    def linear(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(root.get_submodule(str(node.target)), nn.Linear)
        return node.target is F.linear

    return any(map(linear, inside)) and not any(mixes(root, node) for node in inside)


class _Bypass(Pass):
    """What both paths share: a selection at each stage, and an edit of each block's region."""

    def requires(self, rewrite: Rewrite) -> None:
        for block in bypassed_blocks(rewrite.traced):
            find_region(rewrite.root, rewrite.traced, block)

    def apply(self, rewrite: Rewrite) -> None:
        for stage in rewrite.traced.markers:
            marker = rewrite.marker(stage)
            tokens = rewrite.insert(marker, flat_tokens, marker.args[0])
            rewrite.records.append(self._select(rewrite, marker, tokens, stage))
        blocks = rewrite.plan.blocks
        for block in bypassed_blocks(rewrite.traced):
            region = find_region(rewrite.root, rewrite.traced, block)
            stage = max(s for s, start in enumerate(blocks) if start <= block)
            with rewrite.graph.inserting_before(rewrite.copy_of(region.total)):
                bypass = rewrite.graph.get_attr(f"{BYPASSES}.{block}")
            self._edit(rewrite, region, bypass, rewrite.records[stage][1])

    def _call(
        self,
        rewrite: Rewrite,
        run: Callable[..., Any],
        marker: fx.Node,
        tokens: fx.Node,
        stage: int,
    ) -> fx.Node:
        with rewrite.graph.inserting_before(marker):
            predictor = rewrite.graph.get_attr(f"{PREDICTORS}.{stage}")
        # no earlier decision is handed on: in this mode a token may come back
        return rewrite.insert(marker, run, predictor, tokens, None, rewrite.context, stage, 0)

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[fx.Node, fx.Node]:
        raise NotImplementedError

    def _edit(self, rewrite: Rewrite, region: Region, bypass: fx.Node, chosen: fx.Node) -> None:
        raise NotImplementedError


class BypassMask(_Bypass):
    """Both branches for every token; the decision chooses."""

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[fx.Node, fx.Node]:
        result = self._call(rewrite, mask_stage, marker, tokens, stage)
        logits, decision = (rewrite.insert(marker, operator.getitem, result, i) for i in range(2))
        return logits, decision

    def _edit(self, rewrite: Rewrite, region: Region, bypass: fx.Node, chosen: fx.Node) -> None:
        source, branch, total = map(rewrite.copy_of, (region.source, region.branch, region.total))
        poison = rewrite.insert(total, getattr, rewrite.context, "poison")
        merged = rewrite.insert(total, choose_branch, source, branch, chosen, bypass, poison)
        total.replace_input_with(branch, merged)


class BypassGather(_Bypass):
    """The MLP for kept tokens only, the light branch for the others, both put back on the grid."""

    def _select(
        self, rewrite: Rewrite, marker: fx.Node, tokens: fx.Node, stage: int
    ) -> tuple[fx.Node, fx.Node]:
        result = self._call(rewrite, gather_stage, marker, tokens, stage)
        kept, logits = (rewrite.insert(marker, operator.getitem, result, i) for i in (1, 2))
        return logits, kept

    def _edit(self, rewrite: Rewrite, region: Region, bypass: fx.Node, chosen: fx.Node) -> None:
        source, branch, total = map(rewrite.copy_of, (region.source, region.branch, region.total))
        inside = [rewrite.copy_of(node) for node in region.inside]
        first = min(inside, key=list(rewrite.graph.nodes).index)
        kept = rewrite.insert(first, take_tokens, source, chosen)
        for node in inside:
            node.replace_input_with(source, kept)
        merged = rewrite.insert(total, merge_branches, source, branch, chosen, bypass)
        total.replace_input_with(branch, merged)
