"""Find which dims of which tensors count tokens, by running a graph with other numbers of them.

No operator is known here by name, but for two kinds that run with tables of any length. The graph
runs on fake tensors with another number of tokens after every stage (a distinct prime more each, so
that each size tells which stage it follows). A dim whose size moved by exactly that number counts
tokens. A node that fails combines tokens with a tensor that was made for all of them (a RoPE table,
a relative-position bias, an attention mask): that tensor is gathered too, and the run goes on.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any

import torch
from torch import fx, nn

from tokenprune.analysis.batch_probe import probe_batch
from tokenprune.analysis.facts import Aligned, Facts, NodeFacts, TokenDim
from tokenprune.analysis.nodes import holds_no_tensor, makers
from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.errors import UnsupportedHostError
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import Environment, evaluate, quiet_trials, run

__all__ = ["facts_along", "find_facts"]

# Extra tokens per stage: primes, so that no multiple or sum looks like another.
EXTRA = tuple(n for n in range(211, 1000) if all(n % d for d in range(2, 32)))


@quiet_trials()
def find_facts(
    root: nn.Module,
    traced: HostGraph,
    markers: Sequence[fx.Node],
    num_prefix: int,
    padding: Collection[fx.Node],
    tokens_leave: bool,
) -> tuple[Facts, bool]:
    """One record for each node; and whether the graph holds for its batch size only.

    Args:
        markers: Of the tokens that each stage prunes.
        padding: Nodes that hold anything of the host's padding mask.
        tokens_leave: False where every tensor keeps its size.

    Raises:
        UnsupportedHostError: A node cannot run with fewer tokens; its place in the host is named.
    """
    with torch.no_grad(), traced.fake_mode:
        facts, bound = probe_batch(root, traced)
    if tokens_leave:
        return facts_along(root, traced, markers, num_prefix, padding, facts), bound
    return facts, bound


@quiet_trials()
def facts_along(
    root: nn.Module,
    traced: HostGraph,
    markers: Sequence[fx.Node],
    num_prefix: int,
    padding: Collection[fx.Node],
    facts: Facts,
    rows: bool = False,
) -> Facts:
    """What is known of each node, and what runs with other numbers of tokens tell; arguments and
    errors as for `find_facts`.

    Args:
        rows: Tokens, which then are windows, may be rows beside those of other images; and numbers
            that equal theirs may be theirs.
    """
    stages = {node: stage for stage, node in enumerate(markers)}
    lengths: dict[fx.Node, dict[int, TokenDim]] = {}
    with torch.no_grad(), traced.fake_mode:
        while True:
            probe = _Run(root, traced, stages, num_prefix, padding, lengths, dict(facts), rows)
            if probe.finishes():
                return probe.facts


class _ResizedError(Exception):
    """One more size turned out to follow the tokens: the run must be made again."""


@dataclass
class _Run:
    """One run with other token counts.

    Attributes:
        length_of: Shapes of tables, read as numbers, that follow the tokens; as far as earlier
            runs found out. A run that finds another adds it and stops.
        facts: What is known of each node beforehand; the run adds to it.
        rows: See `facts_along`.
        follows: Node -> the latest stage whose tokens its data holds.
        passed: Node -> the latest stage entered before it.
        full: N, patches before the first stage.
    """

    root: nn.Module
    traced: HostGraph
    markers: Mapping[fx.Node, int]
    prefix: int
    padding: Collection[fx.Node]
    length_of: dict[fx.Node, dict[int, TokenDim]]
    facts: dict[fx.Node, NodeFacts]
    rows: bool = False
    follows: dict[fx.Node, int] = field(default_factory=dict)
    passed: dict[fx.Node, int] = field(default_factory=dict)
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
        except _ResizedError:
            return False
        return True

    def _note(self, node: fx.Node, **found: Any) -> None:
        self.facts[node] = replace(self.facts[node], **found)

    def _step(self, node: fx.Node, env: Environment) -> Any:
        base = node.meta["val"]
        self.passed[node] = self.latest
        if node in self.markers:
            return self._enter(node, self.markers[node], base)
        length = self._length(node)
        if length is not None:
            self._note(node, follows_tokens=True, length_of=length)
            if isinstance(base, int):
                return base + EXTRA[length[0].stage]
            return torch.Size(_with_extra(base, length))
        sources = [self.follows[n] for n in node.all_input_nodes if n in self.follows]
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
            if self.rows and self._resize(node):
                raise _ResizedError
            self._note(node, whole_table=True)
            return base
        value = evaluate(self.root, node, env)
        if plain and value != base:
            self._note(node, follows_tokens=True)
        return value

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
        if base.ndim != 3:
            raise UnsupportedHostError(
                f"Stage {stage} needs tokens [B, L, D] at block {node.args[1]}, found a tensor of "
                f"shape {tuple(base.shape)} at {node.meta['where']}. A host that keeps a grid "
                "needs a recipe with `mode: bypass`."
            )
        patches = base.shape[1] - self.prefix
        if self.full and patches != self.full:
            raise UnsupportedHostError(
                f"Stage {stage} (block {node.args[1]}) sees {patches} patch tokens, stage 0 saw "
                f"{self.full}: the host pools tokens in between. Put all stages into one stretch "
                f"of blocks with equal length. Found at {node.meta['where']}."
            )
        self.full, self.latest, self.follows[node] = patches, stage, stage
        return base.new_empty(base.shape[0], base.shape[1] + EXTRA[stage], base.shape[2])

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
        if self._resize(node) or (self.rows and self._count(node)):
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
        if self.rows and value.ndim and value.shape[0] == self.traced.batch_size * self.full:
            yield Aligned({0: TokenDim(stage, 0)}, value.ndim, rows, folded=True)
        most = 1 if self.rows else len(dims)
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
        return moves <= {0, more, self.traced.batch_size * more if self.rows else more}

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
            if self.rows and not any(self._is_table(used) for used in tables):
                continue
            if of_table and stage >= 0 and number not in self.length_of:
                dims = {d: TokenDim(stage, lengths[n]) for d, n in enumerate(shape) if n in lengths}
                if self.rows:  # one dim counts windows, the first one
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
            if stages:
                dims[d] = TokenDim(stages[0], old - self.full)
            elif new != old:
                self._note(node, folded=True)
        self._note(node, dims=dims)
        return True


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
