"""The end of each block that acts on each token alone, found in the graph; bypass splits it.

In each block, the last residual sum `x + f(x)` is looked for whose `f` ends in a feed-forward part.
The end of `f` that acts on each token alone is the tail that dropped tokens go around; all of `f`
in most hosts, what follows the depthwise convolution where there is one. Whether it holds its
tokens in rows, as a grid, channels first or last, is read off the shapes; that the tail runs on any
number of tokens is tried.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.grids import Grid, grid_of
from tokenprune.analysis.operators import Kind, attends, couples, kind_of
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.layout import Layout
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate, quiet_trials

__all__ = ["Tail", "find_tails", "prunable_blocks"]

PROBED = 211  # tokens that a tail is tried on: a prime, so that no window size divides it


@dataclass(frozen=True)
class Tail:
    """The per-token end of one block's residual branch: `total = source + branch`.

    Attributes:
        stage: The stage whose decision holds here.
        source: What the light branch reads.
        branch: Its per-token branch.
        total: Their sum.
        layout: Of all three.
        inside: The nodes that run for kept tokens only.
        reads: The tensors of tokens that those read, and the layout of each.
    """

    stage: int
    source: fx.Node
    branch: fx.Node
    total: fx.Node
    layout: Layout
    inside: frozenset[fx.Node]
    reads: Mapping[fx.Node, Layout]


def find_tails(
    root: nn.Module,
    traced: HostGraph,
    blocks: Blocks,
    starts: Sequence[int],
    grids: Sequence[Grid],
    num_prefix: int,
) -> dict[int, Tail]:
    """Block -> tail, for each block that a stage's decision holds for.

    A decision holds for the blocks from its stage on whose tokens lie on the same grid, up to the
    next stage on that grid.

    Args:
        starts: The block of each stage.
        grids: The tokens that each stage sees.
        num_prefix: P.

    Raises:
        UnsupportedHostError: A stage whose decision no block can use, so that it would do nothing.
    """
    found: dict[int, Tail] = {}
    for number, block in blocks.items():
        grid = grid_of(root, traced.batch_size, block, num_prefix)
        stages = [s for s, start in enumerate(starts) if start <= number and grids[s] == grid]
        if stages:
            tail = _Search(root, traced, block, grid).tail(stages[-1])
            if tail is not None:
                found[number] = tail
    for stage, start in enumerate(starts):
        if not any(tail.stage == stage for tail in found.values()):
            able = sorted(chain(*prunable_blocks(root, traced, blocks, num_prefix).values()))
            advice = f"Blocks that have one: {able}" if able else "No block has one"
            raise UnsupportedHostError(
                f"Block {start} has no residual branch that acts on each token alone (an MLP), so "
                "tokens cannot bypass it, and no block after it on the same grid has one before "
                f"the next stage. {advice}. Found at {blocks[start].entry.meta['where']}."
            )
    return found


def prunable_blocks(
    root: nn.Module, traced: HostGraph, blocks: Blocks, num_prefix: int
) -> dict[Grid, list[int]]:
    """Grid -> the blocks on it that have a tail."""
    found: dict[Grid, list[int]] = {}
    for number, block in blocks.items():
        grid = grid_of(root, traced.batch_size, block, num_prefix)
        if _Search(root, traced, block, grid).tail(0) is not None:
            found.setdefault(grid, []).append(number)
    return found


def _needs(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether `user` carries a value out of `inside`; one without users writes in place."""
    return user not in inside and bool(user.users or user.op == "output")


class _Search:
    """The search in one block."""

    def __init__(self, root: nn.Module, traced: HostGraph, block: Block, grid: Grid) -> None:
        self.root, self.traced, self.grid = root, traced, grid
        self.nodes = list(block.call.nodes())
        self.outside = set(traced.graph.nodes).difference(self.nodes)

    def tail(self, stage: int) -> Tail | None:
        """The last one; None if the block has none."""
        for total in reversed(self.nodes):
            if kind_of(self.root, total) is not Kind.ADD or len(total.args) < 2:
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
                # the projection after an attention is no feed-forward part; a whole MLP is
                if end is not None and sum(map(self._projects, end[0])) > self._attends(
                    source, branch
                ):
                    return Tail(stage, source, branch, total, layout, *end)
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
        """The nodes after the last that couples tokens, and the tokens that they read."""
        ends = {source, *self.outside}
        ends.update(node for node in self.nodes if couples(self.root, node))
        while True:
            inside = self._made_by(branch, ends)
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

    def _made_by(self, branch: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
        """The nodes that make `branch`, back to `ends`."""
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
        rows = shape[0] // images
        last = rows * math.prod(shape[1:-1]) == self.grid.length
        first = rows * math.prod(shape[2:]) == self.grid.length
        if first and last:
            first = self.grid.layout.channels_first
        return Layout(rows, first) if first or last else None

    def _width(self, node: fx.Node, layout: Layout) -> int:
        shape = node.meta["val"].shape
        return int(shape[1] if layout.channels_first else shape[-1])

    def _projects(self, node: fx.Node) -> bool:
        return kind_of(self.root, node) is Kind.PROJECTION
