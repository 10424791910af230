"""Attention in windows, found in the graph: `total = x + f(x)` where f cuts x into windows first.

Nothing is known by name. Where a tensor has as many rows an image as there are windows, the host's
own operators in front of it are run on the numbers of the tokens: what comes out says which token
goes to which place of which window, however that is written, and operators that do more than move
tokens show themselves. So it is with the way back. What runs between the two is probed with another
number of windows, as hosts are probed with another number of tokens: so tables of all windows (the
mask of shifted ones) are found, and numbers that follow them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.cuts import cut_of
from tokenprune.analysis.facts import NO_FACTS, Facts
from tokenprune.analysis.grids import Grid
from tokenprune.analysis.nodes import holds_no_tensor, makers
from tokenprune.analysis.operators import Kind, couples, kind_of
from tokenprune.analysis.tails import BlockSearch, Sum
from tokenprune.analysis.window_rows import facts_between
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.layout import Layout, flat_tokens, flat_tokens_back
from tokenprune.ops.windows import Windows
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate

__all__ = ["Cut", "Part", "WindowBranch", "WindowedBlock", "windowed_blocks"]


class Cut(NamedTuple):
    """Where tokens become rows of windows, or the other way round.

    Attributes:
        grid: The node that holds them as the stream does.
        grid_layout: How.
        rows: The node that holds a row for each window.
        channels_first: So it does in these.
        between: The nodes from one to the other, without the last.
    """

    grid: fx.Node
    grid_layout: Layout
    rows: fx.Node
    channels_first: bool
    between: tuple[fx.Node, ...]


@dataclass(frozen=True)
class WindowBranch:
    """The attention of one block in windows: `total = source + branch`.

    Attributes:
        sum: The sum.
        windows: How tokens go into windows.
        before: Nodes from the source to the grid that is cut, which act on each token alone.
        into: Where it is cut.
        out: Where it is put together again.
        after: Nodes from there to the branch, which act on each token alone.
        facts: What follows the number of windows, as stage 0: of the nodes between rows and rows,
            and of numbers that they read.
        inside: The nodes between rows and rows.
    """

    sum: Sum
    windows: Windows
    before: frozenset[fx.Node]
    into: Cut
    out: Cut
    after: frozenset[fx.Node]
    facts: Facts
    inside: frozenset[fx.Node]


class Part(NamedTuple):
    """A sum whose branch leaves with the windows.

    Attributes:
        sum: The sum.
        attention: The branch, if it attends in windows; otherwise it acts on each token alone.
        inside: The nodes that run for tokens of kept windows only.
        reads: The tensors of tokens that those and the sum read, and the layout of each.
        same: Of `reads`, what holds the sum of the part before, in the same order.
    """

    sum: Sum
    attention: WindowBranch | None
    inside: frozenset[fx.Node]
    reads: Mapping[fx.Node, Layout]
    same: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class WindowedBlock:
    """A block that attends in windows.

    Attributes:
        grid: The tokens that enter it.
        parts: In order: the attention in windows, then what acts on each token alone.
    """

    grid: Grid
    parts: tuple[Part, ...]

    @property
    def windows(self) -> list[Windows]:
        """Of each attention."""
        return [part.attention.windows for part in self.parts if part.attention is not None]


def windowed_blocks(
    root: nn.Module, traced: HostGraph, blocks: Blocks, num_prefix: int, facts: Facts
) -> dict[int, WindowedBlock]:
    """Number -> block, for those that attend in more than one window."""
    found = {}
    for number, block in blocks.items():
        search = _Search(root, traced, block, num_prefix, facts)
        parts = search.parts()
        if parts:
            found[number] = WindowedBlock(search.grid, parts)
    return found


class _Search(BlockSearch):
    """The search in one block."""

    def __init__(
        self, root: nn.Module, traced: HostGraph, block: Block, num_prefix: int, facts: Facts
    ) -> None:
        super().__init__(root, traced, block, num_prefix)
        self.facts = facts
        self.order = {node: place for place, node in enumerate(self.nodes)}

    def parts(self) -> tuple[Part, ...]:
        """See `WindowedBlock`; nothing before the first attention in windows."""
        rows = self.grid.layout.rows_per_image
        if self.grid.num_patches < self.grid.length:
            return ()  # prefix tokens are in no window
        if not any(self._rows(node) > rows for node in self.nodes):
            return ()
        found: dict[fx.Node, Part] = {}
        for each in sorted(self.sums(), key=lambda each: self.order[each.total]):
            if each.total not in found:
                part = self._part(each, bool(found))
                if part is not None:
                    before = list(found)[-1:]
                    same = {
                        n for n, layout in part.reads.items() if self._is_same(n, layout, before)
                    }
                    found[each.total] = part._replace(same=frozenset(same))
        return tuple(found.values())

    def _part(self, each: Sum, after: bool) -> Part | None:
        """What a sum is, `after` an attention in windows or not."""
        attention = self._branch(each)
        own = {each.source: each.layout}
        if attention is not None:
            return Part(each, attention, attention.before | attention.after, own)
        tail = self.tail_of(each, 0) if after else None
        return None if tail is None else Part(each, None, tail.inside, {**tail.reads, **own})

    def _is_same(self, node: fx.Node, layout: Layout, totals: Sequence[fx.Node]) -> bool:
        """Whether a node holds the tokens of one of `totals` in the same order."""
        chain: list[fx.Node] = []
        for made in self._single_inputs(node):
            if made in totals:
                start = self.layout(made)
                value = start and self._run(chain, made, self._numbers(made, start))
                return value is not None and torch.equal(value, self._numbers(node, layout))
            chain.insert(0, made)
        return False

    def _rows(self, node: fx.Node) -> int:
        return self.facts.get(node, NO_FACTS).rows_per_image or 0

    def _branch(self, each: Sum) -> WindowBranch | None:
        rows = each.layout.rows_per_image
        of_windows = {node for node in self.nodes if self._rows(node) > rows}
        after = self.per_token_end(each.source, each.branch, of_windows)
        reads = set(self.reads(after)) - {each.source}
        end = each.branch if not after else next(iter(reads), each.branch)
        if len(reads) > 1 or not self._keeps_order(after):
            return None
        for last in self._single_inputs(end):
            if last in of_windows and last is not end:
                into = self._cut(each.source, last)
                out = None if into is None else self._way_back(last, end, *into)
                if into is not None and out is not None:
                    return self._between(each, *into, out, after)
        return None

    def _single_inputs(self, node: fx.Node) -> Iterator[fx.Node]:
        """`node` and what it was made of, as long as that is one tensor, up to what enters."""
        yield node
        while node not in self.outside:
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            if len(tensors) != 1:
                return
            (node,) = tensors
            yield node

    def _cut(self, source: fx.Node, last: fx.Node) -> tuple[Windows, Cut] | None:
        """Where `source` becomes the rows of windows of which `last` is made."""
        made_of = set(makers(last, lambda n: n is not source and n not in self.outside))
        rows = self._rows(last)
        for node in self.nodes:
            if node in made_of and self._rows(node) == rows:
                found = self._cut_at(source, node)
                if found is not None:
                    return found
        return None

    def _cut_at(self, source: fx.Node, rows: fx.Node) -> tuple[Windows, Cut] | None:
        best, between = None, list[fx.Node]()
        for node in self._single_inputs(rows):
            between.insert(0, node)
            layout = self.layout(node)
            if layout is None or node is rows:
                continue
            found = self._windows(node, layout, between[1:], rows)
            if found is not None:
                windows, channels_first = found
                best = windows, Cut(node, layout, rows, channels_first, tuple(between[:-1]))
            if node is source:
                break
        return best

    def _windows(
        self, grid: fx.Node, layout: Layout, chain: list[fx.Node], rows: fx.Node
    ) -> tuple[Windows, bool] | None:
        """How the nodes of `chain` cut up the grid that `grid` holds."""
        numbers = self._numbers(grid, layout)
        value = self._run(chain, grid, numbers)
        if value is None or value.shape != rows.meta["val"].shape:
            return None
        for channels_first in (False, True):
            if value.ndim < 3 or (channels_first and value.ndim < 4):
                continue
            table = self._table(value, Layout(self._rows(rows), channels_first))
            if table is not None:
                sizes = self._sizes((grid, *chain))
                windows = cut_of(table.reshape(self._rows(rows), -1), self.grid.length, sizes)
                return None if windows is None else (windows, channels_first)
        return None

    def _sizes(self, chain: tuple[fx.Node, ...]) -> list[tuple[int, int]]:
        """Heights and widths that the grid may have."""
        seen = []
        for node in chain:
            shape = tuple(node.meta["val"].shape)
            if len(shape) == 4 and shape[0] == self.traced.batch_size:
                seen += [shape[1:3], shape[2:4]]
        return [(h, w) for h, w in dict.fromkeys(seen) if h * w == self.grid.length]

    def _way_back(self, last: fx.Node, end: fx.Node, windows: Windows, into: Cut) -> Cut | None:
        """From rows of windows to the grid, if the tokens come back where they were."""
        layout = self.layout(end)
        if layout is None:
            return None
        between: list[fx.Node] = []
        for node in self._single_inputs(end):
            between.insert(0, node)
            if node is last:
                break
        shape, rows = last.meta["val"].shape, windows.number
        length = self.grid.length
        table = windows.tokens(torch.device("cpu")).flatten() + 1
        for channels_first in (False, True):
            width = shape[1 if channels_first else -1]
            if shape.numel() != self.traced.batch_size * rows * windows.places * width:
                continue
            images = torch.arange(self.traced.batch_size, device="cpu")[:, None] * length
            numbers = torch.where(table > 0, table + images, 0).double().unsqueeze(-1)
            numbers = numbers.expand(-1, -1, width)
            given = flat_tokens_back(numbers, tuple(shape), Layout(rows, channels_first))
            value = self._run(between[1:], last, given)
            if value is not None and torch.equal(value, self._numbers(end, layout)):
                return Cut(end, layout, last, channels_first, tuple(between[:-1]))
        return None

    def _numbers(self, node: fx.Node, layout: Layout) -> Tensor:
        """A tensor like that of `node`, of the numbers of the tokens of all images, from 1."""
        shape, batch = node.meta["val"].shape, self.traced.batch_size
        width = shape[1 if layout.channels_first else -1]
        numbers = torch.arange(1, batch * self.grid.length + 1, device="cpu").double()
        numbers = numbers.reshape(batch, -1, 1).expand(-1, -1, width)
        return flat_tokens_back(numbers, tuple(shape), layout).clone()

    def _table(self, value: Tensor, layout: Layout) -> Tensor | None:
        """The number of the token at each place of an image, 0 where none is, of what numbers of
        tokens became; None if that is anything else, or another one in another image."""
        tokens, length = flat_tokens(value, layout), self.grid.length
        if not torch.equal(tokens, tokens[..., :1].expand_as(tokens)):
            return None
        images = torch.arange(len(tokens), device=tokens.device)[:, None] * length
        found = torch.where(tokens[..., 0] == 0, 0, tokens[..., 0] - images)
        if not torch.equal(found, found[:1].expand_as(found)):
            return None
        table = found[0].long()
        whole = torch.arange(1, length + 1, device=table.device)
        exact = torch.equal(table.double(), found[0]) and torch.equal(
            table[table != 0].sort().values, whole
        )
        return table if exact else None

    @staticmethod
    def _run_one(root: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        known = {n: n.meta["val"] for n in node.all_input_nodes if n not in env}
        return evaluate(root, node, {**known, **env})

    def _run(self, chain: list[fx.Node], first: fx.Node, value: Tensor) -> Tensor | None:
        """What nodes, each of which reads the one before, make of a value of `first`."""
        with torch.no_grad():
            for node in chain:
                try:
                    value = self._run_one(self.root, node, {first: value})
                except Exception:  # whatever it says: it does more than to move tokens
                    return None
                if not isinstance(value, Tensor):
                    return None
                first = node
        return value

    def _keeps_order(self, nodes: frozenset[fx.Node]) -> bool:
        """Whether nodes that do nothing but move tokens leave each where it is."""
        for node in nodes:
            tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            if len(tensors) != 1 or holds_no_tensor(node.meta["val"]):
                continue
            old, new = self.layout(tensors[0]), self.layout(node)
            if old is None or new is None:
                continue
            value = self._run([node], tensors[0], self._numbers(tensors[0], old))
            if value is None or value.shape != node.meta["val"].shape:
                continue
            table = self._table(value, new)
            if table is not None and not torch.equal(table, table.sort().values):
                return False
        return True

    def _before(self, source: fx.Node, grid: fx.Node) -> frozenset[fx.Node] | None:
        """The nodes from `source` to `grid`, if each acts on a token alone and nothing else reads
        what it makes."""
        if grid is source:
            return frozenset()
        ends = {source, *self.outside}
        inside = frozenset(makers(grid, lambda n: n not in ends and n.op != "get_attr"))
        reads = set(self.reads(inside))
        shared = (user for n in inside - {grid} for user in n.users if user not in inside)
        if reads != {source} or any(couples(self.root, node) for node in inside):
            return None
        if any(not holds_no_tensor(user.meta.get("val")) for user in shared):
            return None
        fits = self.first_that_fails(inside) is None and self._keeps_order(inside)
        return inside if fits else None

    def _between(
        self, each: Sum, windows: Windows, into: Cut, out: Cut, after: frozenset[fx.Node]
    ) -> WindowBranch | None:
        """The branch, if what runs between rows and rows runs with fewer of them."""
        before = self._before(each.source, into.grid)
        if before is None or windows.number < 2:
            return None
        made_of = set(makers(out.rows, lambda n: n not in self.outside and n is not into.rows))
        inside, stream = {into.rows}, {each.source}
        for node in self.nodes:
            read = set(node.all_input_nodes)
            if kind_of(self.root, node) is Kind.FACTORY:  # it reads no more than a type
                read -= {n for n in read if not holds_no_tensor(n.meta["val"])}
            if node in made_of and not inside.isdisjoint(read):
                inside.add(node)
            if any(n in stream for n in read if not holds_no_tensor(n.meta["val"])):
                stream.add(node)
        inside.discard(into.rows)
        read = {n for node in inside for n in node.all_input_nodes} - inside - {into.rows}
        if any(n in stream and not holds_no_tensor(n.meta["val"]) for n in read):
            return None  # something else of the image goes into the windows
        try:
            facts = facts_between(self, self.facts, windows.number, into.rows, inside)
        except UnsupportedHostError:
            return None
        return WindowBranch(each, windows, before, into, out, after, facts, frozenset(inside))
