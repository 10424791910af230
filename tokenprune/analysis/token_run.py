"""One run of a traced graph with other numbers of tokens, on fake tensors."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import fx, nn

from tokenprune.analysis.facts import Aligned, NodeFacts, TokenDim
from tokenprune.analysis.grids import Grid
from tokenprune.analysis.nodes import holds_no_tensor, makers
from tokenprune.analysis.operators import Kind, attends, kind_of
from tokenprune.analysis.stretch import Stretch
from tokenprune.errors import UnsupportedHostError
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import Environment, evaluate, run
from tokenprune.tracing.opaque import OPAQUE

__all__ = ["TokenRun"]

# Extra tokens per stage: primes, so that no multiple or sum looks like another.
EXTRA = tuple(n for n in range(211, 1000) if all(n % d for d in range(2, 32)))

RESHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze")


class _ResizedError(Exception):
    """One more size turned out to follow the tokens: the run must be made again."""


@dataclass
class TokenRun:
    """One run with other token counts.

    Attributes:
        length_of: Shapes of tables, read as numbers, that follow the tokens; as far as earlier
            runs found out. A run that finds another adds it and stops.
        facts: What is known of each node beforehand; the run adds to it.
        follows: Node -> the latest stage whose tokens its data holds.
        passed: Node -> the latest stage entered before it.
        full: N, patches before the first stage.
        rows: Nodes that hold a grid, which is one row of more tokens now.
        until: The last node to run; None for all.
        windows: See `token_probe.facts_along`.
    """

    root: nn.Module
    traced: HostGraph
    markers: Mapping[fx.Node, int]
    grids: Sequence[Grid]
    prefix: int
    padding: Collection[fx.Node]
    stretches: Sequence[Stretch]
    length_of: dict[fx.Node, dict[int, TokenDim]]
    facts: dict[fx.Node, NodeFacts]
    until: fx.Node | None = None
    windows: bool = False
    follows: dict[fx.Node, int] = field(default_factory=dict)
    passed: dict[fx.Node, int] = field(default_factory=dict)
    rows: set[fx.Node] = field(default_factory=set)
    latest: int = -1
    full: int = 0

    def finishes(self) -> bool:
        """Run until the end, or until one more size turns out to follow the tokens (False)."""
        inputs = {name: node.meta["val"] for name, node in self.traced.inputs.items()}
        try:
            for node, value in run(self.root, self.traced.graph, inputs, self._step):
                holds_tokens = node in self.follows and isinstance(value, torch.Tensor)
                if holds_tokens and not self._classify(node, value):
                    return False
                if any(node is stretch.end for stretch in self.stretches):
                    self.latest, self.full = -1, 0
                if node is self.until:
                    break
        except _ResizedError:
            return False
        return True

    def _note(self, node: fx.Node, **found: Any) -> None:
        self.facts[node] = replace(self.facts[node], **found)

    def _step(self, node: fx.Node, env: Environment) -> Any:
        base = node.meta["val"]
        whole = [n for n in node.all_input_nodes if self._is_outside(node, n)]
        if whole:
            env = env | {n: n.meta["val"] for n in whole}
        self.passed[node] = self.latest
        if node in self.markers:
            return self._enter(node, self.markers[node], base)
        length = self._length(node)
        if length is not None:
            self._note(node, follows_tokens=True, length_of=length)
            if isinstance(base, int):
                return base + EXTRA[length[0].stage]
            return torch.Size(_with_extra(base, length))
        inputs = [n for n in node.all_input_nodes if n not in whole]
        sources = [self.follows[n] for n in inputs if n in self.follows]
        if OPAQUE in node.meta and any(self.facts[n].dims or self.facts[n].folded for n in inputs):
            raise UnsupportedHostError(
                "A module that decides by what tensors hold runs as it is, and cannot be given "
                f"tokens of which some have left: {node.meta[OPAQUE].where}. Prune after it; or "
                "leave out what it is for (labels, if it is a loss), and compute that from the "
                "model's output."
            )
        counted = None if sources or self.latest < 0 else self._counted(node)
        if counted is not None:
            self.follows[node] = self.latest
            self._note(node, gathers=counted, counts_real=True)
            return self._evaluate(node, env, counted)
        if all(env[n] is n.meta["val"] for n in node.all_input_nodes):
            return base  # nothing that goes in has another size
        any_length = kind_of(self.root, node) is Kind.ANY_LENGTH
        plain = holds_no_tensor(base)
        if sources and (any_length or not plain):
            self.follows[node] = max(sources)
            if any_length:
                return self._align(node, env, None)
            try:
                return evaluate(self.root, node, env)
            except Exception as error:
                return self._align(node, env, error)
        if not plain and any(self.facts[n].follows_tokens for n in node.all_input_nodes):
            if self.windows and self._resize(node):
                raise _ResizedError
            self._note(node, whole_table=True)
            return base
        value = evaluate(self.root, node, env)
        if plain and value != base:
            self._note(node, follows_tokens=True)
        return value

    def _is_outside(self, node: fx.Node, used: fx.Node) -> bool:
        """Whether a node is given all tokens of another one that holds some."""
        return any(stretch.gives_all(used, node) for stretch in self.stretches)

    def _length(self, node: fx.Node) -> dict[int, TokenDim] | None:
        """Which dims of a table's shape follow the tokens: as said of this node, or of one before
        that read the shape of the same table (each block its own)."""
        if node not in self.length_of:
            read = (node.op, node.target, node.args, node.kwargs)
            for known, dims in self.length_of.items():
                if self.latest >= 0 and read == (known.op, known.target, known.args, known.kwargs):
                    return {d: dim._replace(stage=self.latest) for d, dim in dims.items()}
        return self.length_of.get(node)

    def _counted(self, node: fx.Node) -> dict[fx.Node, Aligned] | None:
        """How to gather what `node` adds up, if it counts real tokens: those that left are none."""
        if kind_of(self.root, node) is not Kind.SUM or node not in self.padding:
            return None
        source = node.all_input_nodes[0]
        found = list(self._alignments(source.meta["val"], self.latest, {0, self.prefix}, 0))
        return {source: found[0]} if found else None

    def _enter(self, node: fx.Node, stage: int, base: torch.Tensor) -> torch.Tensor:
        if not self.stretches and base.ndim != 3:
            raise UnsupportedHostError(
                f"Stage {stage} needs tokens [B, L, D] at block {node.args[1]}, found a tensor of "
                f"shape {tuple(base.shape)} at {node.meta['where']}. A host that keeps a grid "
                "needs a recipe with `mode: bypass`."
            )
        length = self.grids[stage].length if self.stretches else base.shape[1]
        patches = length - self.prefix
        if self.full and patches != self.full:
            raise UnsupportedHostError(
                f"Stage {stage} (block {node.args[1]}) sees {patches} patch tokens, stage 0 saw "
                f"{self.full}: the host pools tokens in between. Put all stages into one stretch "
                f"of blocks with equal length. Found at {node.meta['where']}."
            )
        self.full, self.latest, self.follows[node] = patches, stage, stage
        if not self.stretches:
            return base.new_empty(base.shape[0], length + EXTRA[stage], base.shape[2])
        layout = self.grids[stage].layout
        return base.new_empty(layout.gathered(base.shape, length + EXTRA[stage]))

    def _align(self, node: fx.Node, env: Environment, error: Exception | None) -> Any:
        """Gather whichever arguments make the node run, and note them; `error` is what it raised
        without, None if it has not been tried, since it takes tables of any length."""
        stage, inputs = self.follows[node], node.all_input_nodes
        holding = [n for n in inputs if self.facts[n].dims]
        offsets = {dim.prefix for n in holding for dim in self.facts[n].dims.values()}
        rank = max((env[n].ndim for n in holding), default=0)
        rows = max((self.facts[n].rows_per_image or 1 for n in holding), default=1)
        tables = [n for n in inputs if n not in self.follows and isinstance(env[n], torch.Tensor)]
        options = {n: list(self._alignments(env[n], stage, offsets, rank, rows)) for n in tables}
        for choice in _choices({n: found for n, found in options.items() if found}):
            try:
                value = self._evaluate(node, env, choice)
            except Exception:
                continue
            if self._as_expected(node, value, stage):
                self._note(node, gathers=choice)
                return value
        if error is None:
            return evaluate(self.root, node, env)
        if self._resize(node) or (self.windows and self._count(node)):
            raise _ResizedError
        raise UnsupportedHostError(
            f"A node cannot run with fewer tokens after stage {stage}: {node.format_node()} at "
            f"{node.meta['where']}. It said: {error}. Prune after it, or leave this host dense."
        ) from error

    def _alignments(
        self, value: torch.Tensor, stage: int, offsets: set[int], rank: int, rows: int = 1
    ) -> Iterator[Aligned]:
        sizes = {self.full + offset: offset for offset in offsets}
        dims = {d: TokenDim(stage, sizes[n]) for d, n in enumerate(value.shape) if n in sizes}
        if self.windows and value.ndim and value.shape[0] == self.traced.batch_size * self.full:
            yield Aligned({0: TokenDim(stage, 0)}, value.ndim, rows, folded=True)
        most = 1 if self.windows else len(dims)
        subsets = chain.from_iterable(combinations(dims, n) for n in range(most, 0, -1))
        for subset in subsets:
            yield Aligned({d: dims[d] for d in subset}, max(rank, value.ndim), rows)

    def _evaluate(self, node: fx.Node, env: Environment, gathers: Mapping[fx.Node, Aligned]) -> Any:
        """Evaluate a node whose arguments are gathered."""
        trial = dict(env)
        for source, aligned in gathers.items():
            value = env[source]
            shape = [1] * (aligned.rank - value.ndim) + _with_extra(value.shape, aligned.dims)
            if aligned.folded:
                shape[0] = value.shape[0] // self.full * (self.full + EXTRA[aligned.dims[0].stage])
            trial[source] = value.new_empty(shape)
        return evaluate(self.root, node, trial)

    def _as_expected(self, node: fx.Node, value: Any, stage: int) -> bool:
        base = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.ndim != base.ndim:
            return not isinstance(base, torch.Tensor)
        moves = {new - old for new, old in zip(value.shape, base.shape, strict=True)}
        more = EXTRA[stage]
        return moves <= {0, more, self.traced.batch_size * more if self.windows else more}

    def _resize(self, node: fx.Node) -> bool:
        """Let the sizes of tables that went into `node` follow the tokens; False if none can.

        A host that splits its tokens by the length of a RoPE table means the length that the table
        has once it is gathered.
        """
        lengths = {self.full + p: p for p in range(self.prefix + 1)}
        found = False
        for number in makers(node, _may_be_numbers):
            shape, tables = number.meta["val"], number.all_input_nodes[:1]
            stage = self.passed.get(number, -1)
            of_table = isinstance(shape, torch.Size) and not any(t in self.follows for t in tables)
            if self.windows and not any(self._is_table(used) for used in tables):
                continue
            if of_table and stage >= 0 and number not in self.length_of:
                dims = {d: TokenDim(stage, lengths[n]) for d, n in enumerate(shape) if n in lengths}
                if self.windows:  # one dim counts windows, the first one
                    dims = dict(list(dims.items())[:1])
                if dims:
                    self.length_of[number] = dims
                    found = True
        return found

    def _is_table(self, node: fx.Node) -> bool:
        """Whether a node holds a tensor that is no image's."""
        return isinstance(node.meta["val"], torch.Tensor) and not self.facts[node].batched

    def _count(self, node: fx.Node) -> bool:
        """Let a number that went into `node` and equals that of the patches follow them; False if
        there is none."""
        for number in makers(node, _may_be_numbers):
            made_of = list(makers(number, _may_be_numbers))
            read = {used for each in made_of for used in each.all_input_nodes}
            known = not self.follows.keys().isdisjoint(
                read
            ) or not self.length_of.keys().isdisjoint(made_of)
            if type(number.meta["val"]) is int and number.meta["val"] == self.full and not known:
                self.length_of[number] = {0: TokenDim(self.passed.get(number, 0), 0)}
                return True
        return False

    def _classify(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Note the token dims of a node; False if the run must be made again."""
        base = node.meta["val"]
        if base.ndim != value.ndim:
            raise UnsupportedHostError(
                f"The rank of {node.format_node()} changes with the number of tokens, at "
                f"{node.meta['where']}."
            )
        if self._is_row(base.shape, value.shape):
            self._check_whole(node)
            self._note(node, folded=True)
            self.rows.add(node)
            return True
        dims = {}
        for d, (old, new) in enumerate(zip(base.shape, value.shape, strict=True)):
            stages = [s for s, extra in enumerate(EXTRA) if new - old == extra]
            if stages and old < self.full:
                # a tensor shorter than the patches cannot hold them all: a wrong size went in
                if self._resize(node):
                    return False
                raise UnsupportedHostError(
                    f"{node.format_node()} holds only {old} of {self.full} patch tokens, at "
                    f"{node.meta['where']}. Tokens that leave must stay one sequence."
                )
            if stages and self._keeps_place(node, d):
                dims[d] = TokenDim(stages[0], old - self.full)
            elif new != old:
                if d:
                    self._check_no_grid(node, d, new)
                self._note(node, folded=True)
        self._note(node, dims=dims)
        return True

    def _keeps_place(self, node: fx.Node, dim: int) -> bool:
        """Whether a token dim of a reshaped tensor has as many numbers in the dims after it as
        before the reshape: else it is another dim, which is as long by chance."""
        sources = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        known = self.facts[sources[0]].dims if len(sources) == 1 else {}
        if not known or getattr(node.target, "__name__", node.target) not in RESHAPES:
            return True
        behind = {math.prod(sources[0].meta["val"].shape[d + 1 :]) for d in known}
        return math.prod(node.meta["val"].shape[dim + 1 :]) in behind

    def _check_no_grid(self, node: fx.Node, dim: int, size: int) -> None:
        """Refuse a node that lays tokens out on as many places as before, and lets another dim take
        up the difference: x.reshape(B, H, W, -1), which runs where H * W divides that dim."""
        shape = node.meta["val"].shape
        read = [d.prefix for n in node.all_input_nodes for d in self.facts[n].dims.values()]
        places = [d for d in range(1, len(shape)) if d != dim]
        runs = (shape[a : b + 1] for a in places for b in places if a <= b and not a < dim < b)
        counts = {math.prod(run) for run in runs} - {1}
        for length in {self.full + offset for offset in (0, self.prefix, *read)}:
            moved = size * length in (shape[dim] * (length + extra) for extra in EXTRA)
            if moved and not self.windows and any(length % count == 0 for count in counts):
                raise UnsupportedHostError(
                    f"A node lays {length} tokens out on a grid: {node.format_node()} at "
                    f"{node.meta['where']}. With fewer tokens it would take channels for places. "
                    "Wrap with restore=True, which puts tokens back before it, or leave this host "
                    "dense."
                )

    def _check_whole(self, node: fx.Node) -> None:
        """Refuse a node that multiplies tokens by tokens along one dim of the grid alone: with all
        of them in one row, it would attend to all."""
        held = [used for used in node.all_input_nodes if used in self.follows]
        if len(held) > 1 and attends(self.root, node) and not self.rows.isdisjoint(held):
            raise UnsupportedHostError(
                f"{node.format_node()} at {node.meta['where']} attends to a part of the grid only, "
                "so its tokens have to keep their places. Use `mode: bypass`."
            )

    def _is_row(self, base: torch.Size, value: torch.Size) -> bool:
        """Whether a tensor holds a grid, [..., H, W, ...], which is one row of more tokens now."""
        moved = [d for d, (old, new) in enumerate(zip(base, value, strict=True)) if old != new]
        if len(moved) < 2:
            return False
        between = slice(moved[0], moved[-1] + 1)
        tokens = math.prod(base[between])
        rows = [(*[1] * (len(base[between]) - 1), tokens + extra) for extra in EXTRA]
        return tokens == self.full + self.prefix and tuple(value[between]) in rows


def _with_extra(shape: Sequence[int], dims: Mapping[int, TokenDim]) -> list[int]:
    """`shape` with the extra tokens of each dim's stage."""
    return [n + (EXTRA[dims[d].stage] if d in dims else 0) for d, n in enumerate(shape)]


def _may_be_numbers(node: fx.Node) -> bool:
    value = node.meta["val"]
    numbers = isinstance(value, tuple | list) or holds_no_tensor(value)
    return numbers and not is_hook_node(node)


def _choices(options: Mapping[fx.Node, Sequence[Aligned]]) -> Iterator[dict[fx.Node, Aligned]]:
    """All arguments at once first, then each alone."""
    width = max(map(len, options.values()), default=0)
    for i in range(width):
        yield {node: found[min(i, len(found) - 1)] for node, found in options.items()}
    if len(options) > 1:
        yield from ({node: aligned} for node, found in options.items() for aligned in found)
