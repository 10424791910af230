"""The end of each block that acts on each token alone, found in the graph; bypass splits it.

In each block, the last residual sum `x + f(x)` is looked for whose `f` ends in a feed-forward part.
The end of `f` that acts on each token alone is the tail that dropped tokens go around; all of `f`
in most hosts, what follows the depthwise convolution where there is one. Whether it holds its
tokens in rows, as a grid, channels first or last, is read off the shapes; that the tail runs on any
number of tokens is tried.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, permutations
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.grids import Grid, grid_of
from tokenprune.analysis.nodes import makers, shape_of
from tokenprune.analysis.operators import Kind, attends, couples, kind_of
from tokenprune.analysis.plan import Plan
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.layout import Layout
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate, quiet_trials

__all__ = ["BlockSearch", "Sum", "Tail", "find_tails", "prunable_blocks"]

PROBED = 999_983  # tokens that a tail is tried on: a prime, so that no window size divides it


class Sum(NamedTuple):
    """`total = source + branch`, all of one layout."""

    total: fx.Node
    source: fx.Node
    branch: fx.Node
    layout: Layout


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
    root: nn.Module, traced: HostGraph, blocks: Blocks, plan: Plan, grids: Sequence[Grid]
) -> dict[int, Tail]:
    """Block -> tail, for each block that a stage's decision holds for.

    A decision holds for the blocks from its stage on whose tokens lie on the same grid (`grids`,
    one a stage), up to the next stage on that grid.

    Raises:
        UnsupportedHostError: A stage whose decision no block can use, so that it would do nothing.
    """
    found: dict[int, Tail] = {}
    for number, block in blocks.items():
        search = BlockSearch(root, traced, block, plan.num_prefix)
        before = [stage for stage, start in enumerate(plan.blocks) if start <= number]
        stages = [stage for stage in before if grids[stage] == search.grid]
        tail = search.tail(stages[-1]) if stages else None
        if tail is not None:
            found[number] = tail
    for stage, start in enumerate(plan.blocks):
        if not any(tail.stage == stage for tail in found.values()):
            able = sorted(chain(*prunable_blocks(root, traced, blocks, plan.num_prefix).values()))
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
        search = BlockSearch(root, traced, block, num_prefix)
        if search.tail(0) is not None:
            found.setdefault(search.grid, []).append(number)
    return found


class BlockSearch:
    """The search in one block.

    Attributes:
        grid: The tokens that enter it.
        nodes: Its nodes, in order.
        outside: All other nodes of the graph.
    """

    def __init__(self, root: nn.Module, traced: HostGraph, block: Block, num_prefix: int) -> None:
        self.root, self.traced = root, traced
        self.grid = grid_of(root, traced.batch_size, block, num_prefix)
        self.nodes = list(block.call.nodes())
        self.outside = set(traced.graph.nodes).difference(self.nodes)

    def sums(self) -> Iterator[Sum]:
        """The sums of tokens of the grid, the last first; both ways round."""
        for total in reversed(self.nodes):
            if kind_of(self.root, total) is not Kind.ADD or len(total.args) < 2:
                continue
            for source, branch in permutations(total.args[:2]):
                if not (isinstance(source, fx.Node) and isinstance(branch, fx.Node)):
                    continue
                layout = self.layout(source)
                if layout is None or set(branch.users) != {total}:
                    continue
                shape = source.meta["val"].shape
                width = shape[1 if layout.channels_first else -1]
                if shape == branch.meta["val"].shape and width == self.grid.num_channels:
                    yield Sum(total, source, branch, layout)

    def tail(self, stage: int) -> Tail | None:
        """The last one; None if the block has none."""
        found = (self.tail_of(each, stage) for each in self.sums())
        return next((tail for tail in found if tail is not None), None)

    def ends(self) -> list[Tail]:
        """The per-token end of each branch of the block's stream, the last first; that after an
        attention as well."""
        found, seen = list[Tail](), set[fx.Node]()  # seen: sums, and what their branches run
        for total, source, branch, layout in self.sums():
            if total in seen:
                continue
            inside = self.per_token_end(source, branch)
            if inside:
                found.append(Tail(0, source, branch, total, layout, inside, self.reads(inside)))
            of_branch, of_source = (
                set(makers(node, lambda n: n not in self.outside)) for node in (branch, source)
            )
            seen |= {total, *of_branch - of_source}
        return found

    def tail_of(self, each: Sum, stage: int) -> Tail | None:
        """That of one sum; None if its branch does not end in a feed-forward part."""
        total, source, branch, layout = each
        inside = self.per_token_end(source, branch)
        # the projection after an attention is no feed-forward part; a whole MLP is
        if sum(map(self._projects, inside)) <= self._attends(source, branch):
            return None
        return Tail(stage, source, branch, total, layout, inside, self.reads(inside))

    def reads(self, inside: frozenset[fx.Node]) -> dict[fx.Node, Layout]:
        """The tensors of tokens that nodes read from outside, and the layout of each."""
        read = {n for node in inside for n in node.all_input_nodes} - inside
        return {n: found for n in read if (found := self.layout(n)) is not None}

    def _attends(self, source: fx.Node, branch: fx.Node) -> bool:
        """Whether there is an attention between `source` (or the block's entry) and `branch`."""
        made_of = makers(branch, lambda n: n is not source and n not in self.outside)
        return any(attends(self.root, node) for node in made_of)

    def per_token_end(
        self, source: fx.Node, branch: fx.Node, after: Collection[fx.Node] | None = None
    ) -> frozenset[fx.Node]:
        """The nodes after the last that couples tokens; none if they project nothing. Those after
        the nodes `after`, if given, whatever they do."""
        ends = {source, *self.outside, *(after or ())}
        ends.update(node for node in self.nodes if couples(self.root, node))
        while branch not in ends:
            inside = frozenset(makers(branch, lambda n: n not in ends and n.op != "get_attr"))
            shared = {n for n in inside - {branch} if self._is_read_outside(n, inside)}
            if shared:  # something that needs all tokens reads these too
                ends.update(shared)
                continue
            if after is None and not any(map(self._projects, inside)):
                break
            stuck = self.first_that_fails(inside)
            if stuck is None:
                return inside
            ends.add(stuck)
        return frozenset()

    def _is_read_outside(self, node: fx.Node, inside: frozenset[fx.Node]) -> bool:
        """Whether a node's value is needed outside; a reader without users writes in place."""
        return any(u not in inside and (u.users or u.op == "output") for u in node.users)

    @quiet_trials()
    def first_that_fails(self, inside: frozenset[fx.Node]) -> fx.Node | None:
        """Run the nodes on another number of tokens; the first that cannot, if any."""
        read = {n for node in inside for n in node.all_input_nodes} - inside
        with torch.no_grad(), self.traced.fake_mode:
            env: dict[fx.Node, Any] = {n: self._probed(n) for n in read}
            for node in (node for node in self.nodes if node in inside):
                try:
                    env[node] = evaluate(self.root, node, env)
                except Exception:  # whatever it says: it does not run on some tokens alone
                    return node
                value, shape = env[node], self._probed_shape(node)
                if shape is not None and isinstance(value, torch.Tensor) and value.shape != shape:
                    return node
        return None

    def _probed(self, node: fx.Node) -> Any:
        value, shape = node.meta["val"], self._probed_shape(node)
        return value if shape is None else value.new_empty(shape)

    def _probed_shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape of a tensor of all tokens, for as many as are tried; None for others."""
        layout = self.layout(node)
        return None if layout is None else layout.gathered(node.meta["val"].shape, PROBED)

    def layout(self, node: fx.Node) -> Layout | None:
        """How `node` holds the tokens of the grid; None if it does not."""
        shape, images = shape_of(node), self.traced.batch_size
        if len(shape) < 3 or node.op == "get_attr" or shape[0] % images:
            return None
        rows = shape[0] // images
        last = rows * math.prod(shape[1:-1]) == self.grid.length
        first = rows * math.prod(shape[2:]) == self.grid.length
        if first and last:
            first = self.grid.layout.channels_first
        return Layout(rows, first) if first or last else None

    def _projects(self, node: fx.Node) -> bool:
        return kind_of(self.root, node) is Kind.PROJECTION
