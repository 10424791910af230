"""Bypass mode: where a host's blocks act on each token alone, found in its graph.

In each block, the last residual sum `x + f(x)` is looked for whose `f` ends in a feed-forward part.
The end of `f` that acts on each token alone is the region which dropped tokens go around; all of
`f` in most hosts, what follows the depthwise convolution where there is one. Whether it holds its
tokens in rows, as a grid, channels first or last, is read off the shapes; that the region runs on
any number of tokens is tried.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tokenprune.analysis.operators import attends, couples
from tokenprune.analysis.plan import Plan
from tokenprune.errors import PlanError, UnsupportedHostError
from tokenprune.ops.bypass import Layout
from tokenprune.tracing.host_graph import Traced
from tokenprune.tracing.interpret import evaluate, quiet_trials

__all__ = ["Grid", "Region", "find_regions", "prunable_blocks", "stage_grids"]

ADDS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
PROBED = 211  # tokens that a region is tried on: a prime, so that no window size divides it


@dataclass(frozen=True)
class Grid:
    """The tokens of one image where they enter a block.

    Attributes:
        length: L, prefix tokens included.
        num_patches: N.
        num_channels: D.
        layout: How the tensor holds them.
    """

    length: int
    num_patches: int
    num_channels: int
    layout: Layout


@dataclass(frozen=True)
class Region:
    """The per-token end of one block's residual branch: `total = source + branch`.

    Attributes:
        stage: Whose decision holds here.
        source: What the light branch reads.
        branch: Its per-token branch.
        total: Their sum.
        layout: Of all three.
        inside: The nodes that run for kept tokens only.
        reads: What those read, token by token, and how it lies there.
    """

    stage: int
    source: fx.Node
    branch: fx.Node
    total: fx.Node
    layout: Layout
    inside: frozenset[fx.Node]
    reads: Mapping[fx.Node, Layout]


def stage_grids(root: nn.Module, traced: Traced, plan: Plan) -> tuple[Grid, ...]:
    """The tokens that each stage sees.

    Raises:
        PlanError: A stage sees fewer than two patch tokens.
        UnsupportedHostError: It cannot be told which dim holds the channels.
    """
    grids = []
    for stage, marker in traced.markers.items():
        grid = _grid_of(root, traced, plan.blocks[stage], plan.num_prefix_tokens)
        if grid.num_patches < 2:
            raise PlanError(
                f"There are {grid.num_patches} patch tokens behind {plan.num_prefix_tokens} prefix "
                f"tokens at block {plan.blocks[stage]} ({marker.meta['where']}); nothing can be "
                "pruned. Check num_prefix_tokens."
            )
        grids.append(grid)
    return tuple(grids)


def _grid_of(root: nn.Module, traced: Traced, block: int, num_prefix: int) -> Grid:
    """The tokens that enter a block."""
    entry = traced.entries[block]
    shape = entry.meta["val"].shape
    if len(shape) < 3:
        raise UnsupportedHostError(
            f"Block {block} takes a tensor of shape {tuple(shape)}; tokens need at least the dims "
            f"[B, L, D]. Found at {entry.meta['where']}."
        )
    first = len(shape) == 4 and _channels_first(root, traced, block)
    layout = Layout(max(shape[0] // traced.batch_size, 1), first)
    channels = shape[1] if first else shape[-1]
    length = shape.numel() // channels // (shape[0] // layout.fold)
    return Grid(length, length - num_prefix, channels, layout)


def _channels_first(root: nn.Module, traced: Traced, block: int) -> bool:
    """Whether a block's [B, ?, ?, ?] is [B, D, H, W]: told by the widths that its modules take."""
    entry = traced.entries[block]
    shape, path = entry.meta["val"].shape, traced.blocks[block]
    modules = list(root.get_submodule(path).modules())
    first = any(_takes_first(module) == shape[1] for module in modules)
    last = any(_takes_last(module) == shape[-1] for module in modules)
    if first != last:
        return first
    square_first, square_last = shape[2] == shape[3], shape[1] == shape[2]
    if square_first != square_last:
        return bool(square_first)
    nodes = list(traced.graph.nodes)
    for node in nodes[nodes.index(entry) :]:  # all dims alike: what the block runs first knows
        runs = node.meta["where"].module
        if f"{runs}.".startswith(f"{path}."):
            module = root.get_submodule(runs)
            if shape[1] in (_takes_first(module), _takes_last(module)):
                return _takes_first(module) is not None
    raise UnsupportedHostError(
        f"Cannot tell which dim of {tuple(shape)} holds the channels of the tokens that enter a "
        f"{type(root.get_submodule(path)).__name__}. Use another image size, so that the dims "
        "differ."
    )


def _takes_first(module: nn.Module) -> int | None:
    """Channels that a module finds in dim 1."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    if isinstance(module, nn.LayerNorm) and type(module).__name__.endswith("2d"):
        return int(module.normalized_shape[-1])
    return None


def _takes_last(module: nn.Module) -> int | None:
    """Channels that a module finds in the last dim."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.LayerNorm) and not type(module).__name__.endswith("2d"):
        return int(module.normalized_shape[-1])
    return None


def find_regions(
    root: nn.Module, traced: Traced, plan: Plan, grids: Sequence[Grid]
) -> dict[int, Region]:
    """Block -> region, for each block that a stage's decision holds for.

    A decision holds for the blocks behind its stage whose tokens lie on the same grid, up to the
    next stage on that grid.

    Raises:
        UnsupportedHostError: A stage whose decision no block can use, so that it would do nothing.
    """
    found: dict[int, Region] = {}
    for block in sorted(traced.entries):
        grid = _grid_of(root, traced, block, plan.num_prefix_tokens)
        stages = [s for s, start in enumerate(plan.blocks) if start <= block and grids[s] == grid]
        if stages:
            region = _Search(root, traced, block, grid).region(stages[-1])
            if region is not None:
                found[block] = region
    for stage, start in enumerate(plan.blocks):
        if not any(region.stage == stage for region in found.values()):
            able = sorted(chain(*prunable_blocks(root, traced, plan.num_prefix_tokens).values()))
            advice = f"Blocks that have one: {able}" if able else "No block has one"
            raise UnsupportedHostError(
                f"Block {start} has no residual branch that acts on each token alone (an MLP), so "
                "tokens cannot bypass it, and no block behind it on the same grid has one before "
                f"the next stage. {advice}. Found at {traced.entries[start].meta['where']}."
            )
    return found


def prunable_blocks(root: nn.Module, traced: Traced, num_prefix: int) -> dict[Grid, list[int]]:
    """Grid -> the blocks on it that have a region."""
    found: dict[Grid, list[int]] = {}
    for block in sorted(traced.entries):
        grid = _grid_of(root, traced, block, num_prefix)
        if _Search(root, traced, block, grid).region(0) is not None:
            found.setdefault(grid, []).append(block)
    return found


def _belongs(node: fx.Node, path: str) -> bool:
    return f"{node.meta['where'].module}.".startswith(f"{path}.")


def _needs(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether `user` carries a value out of `inside`; one without users writes in place."""
    return user not in inside and bool(user.users or user.op == "output")


class _Search:
    """The search in one block."""

    def __init__(self, root: nn.Module, traced: Traced, block: int, grid: Grid) -> None:
        self.root, self.traced, self.grid = root, traced, grid
        path, entry = traced.blocks[block], traced.entries[block]
        nodes: list[fx.Node] = list(traced.graph.nodes)
        behind = nodes[nodes.index(entry) :]
        self.nodes = [node for node in behind if _belongs(node, path)]
        self.outside = set(nodes).difference(self.nodes)

    def region(self, stage: int) -> Region | None:
        """The last one; None if the block has none."""
        for total in reversed(self.nodes):
            if total.target not in ADDS or len(total.args) < 2:
                continue
            for source, branch in (total.args[:2], total.args[1::-1]):
                if not (isinstance(source, fx.Node) and isinstance(branch, fx.Node)):
                    continue
                layout = self._layout(source)
                if layout is None or source.meta["val"].shape != branch.meta["val"].shape:
                    continue
                if self._width(source, layout) != self.grid.num_channels:
                    continue
                if set(branch.users) != {total}:
                    continue
                end = self._per_token_end(source, branch, layout)
                # the projection behind an attention is no feed-forward part; a whole MLP is
                if end is not None and sum(map(self._projects, end[0])) > self._attends(
                    source, branch
                ):
                    return Region(stage, source, branch, total, layout, *end)
        return None

    def _attends(self, source: fx.Node, branch: fx.Node) -> bool:
        """Whether there is an attention between `source` (or the block's entry) and `branch`."""
        seen = {source, *self.outside}
        queue = [branch]
        while queue:
            node = queue.pop()
            if attends(self.root, node):
                return True
            fresh = set(node.all_input_nodes) - seen
            seen |= fresh
            queue.extend(fresh)
        return False

    def _per_token_end(
        self, source: fx.Node, branch: fx.Node, layout: Layout
    ) -> tuple[frozenset[fx.Node], dict[fx.Node, Layout]] | None:
        """The nodes behind the last that couples tokens, and what they read of each token."""
        ends = {source, *self.outside}
        ends.update(node for node in self.nodes if couples(self.root, node))
        while True:
            inside = self._behind(ends, branch)
            shared = {n for n in inside - {branch} if any(_needs(u, inside) for u in n.users)}
            if shared:  # something that needs all tokens reads these too
                ends |= shared
                continue
            if not any(self._projects(node) for node in inside):
                return None
            read = {n for node in inside for n in node.all_input_nodes if n not in inside}
            reads = {n: found for n in read if (found := self._layout(n)) is not None}
            stuck = self._first_that_fails(inside, reads, branch, layout)
            if stuck is None:
                return frozenset(inside), reads
            ends.add(stuck)

    def _behind(self, ends: set[fx.Node], branch: fx.Node) -> set[fx.Node]:
        inside: set[fx.Node] = set()
        queue = [branch]
        while queue:
            node = queue.pop()
            if node not in ends and node not in inside and node.op != "get_attr":
                inside.add(node)
                queue.extend(node.all_input_nodes)
        return inside

    @quiet_trials()
    def _first_that_fails(
        self,
        inside: set[fx.Node],
        reads: Mapping[fx.Node, Layout],
        branch: fx.Node,
        layout: Layout,
    ) -> fx.Node | None:
        """Run the nodes on another number of tokens; the first that cannot, if any."""
        env: dict[fx.Node, Any] = {}
        with torch.no_grad(), self.traced.fake_mode:
            for node in (node for node in self.nodes if node in inside):
                for read in node.all_input_nodes:
                    if read not in inside and read not in env:
                        env[read] = self._probed(read, reads.get(read))
                try:
                    env[node] = evaluate(self.root, node, env)
                except Exception:  # whatever it says: it does not run on some tokens alone
                    return node
                if not self._follows(node, env[node]):
                    return node
        wanted = layout.gathered(branch.meta["val"].shape, PROBED)
        return None if tuple(env[branch].shape) == wanted else branch

    def _probed(self, node: fx.Node, layout: Layout | None) -> Any:
        value = node.meta["val"]
        if layout is None:
            return value
        return value.new_empty(layout.gathered(value.shape, PROBED))

    def _follows(self, node: fx.Node, value: Any) -> bool:
        """Whether a node that holds all tokens at full length holds the probed ones now."""
        layout = self._layout(node)
        if layout is None or not isinstance(value, torch.Tensor):
            return True
        return tuple(value.shape) == layout.gathered(node.meta["val"].shape, PROBED)

    def _layout(self, node: fx.Node) -> Layout | None:
        """How `node` holds the tokens of the grid; None if it does not."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim < 3 or node.op == "get_attr":
            return None
        shape, images = value.shape, self.traced.batch_size
        if shape[0] % images:
            return None
        fold = shape[0] // images
        last = fold * math.prod(shape[1:-1]) == self.grid.length
        first = fold * math.prod(shape[2:]) == self.grid.length
        if first and last:
            first = self.grid.layout.channels_first
        return Layout(fold, first) if first or last else None

    def _width(self, node: fx.Node, layout: Layout) -> int:
        shape = node.meta["val"].shape
        return int(shape[1] if layout.channels_first else shape[-1])

    def _projects(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), nn.Linear | nn.Conv2d)
        return node.target in (F.linear, F.conv2d, torch.addmm)
