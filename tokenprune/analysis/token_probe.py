"""Find which dims of which tensors count tokens, by running the graph with other numbers of them.

No operator is known here by name. The graph runs twice more on fake tensors: once with another
batch size, once with another number of tokens after every stage (a distinct prime more each, so
that each size says which stage it follows). A dim whose size moved by exactly that number counts
tokens. A node that fails on the second run combines tokens with a tensor that was made for all of
them (a RoPE table, a relative-position bias, an attention mask): that tensor is gathered too, and
the run goes on.
"""

import logging
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, combinations
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tokenprune.analysis.facts import Aligned, TokenAxes, TokenDim
from tokenprune.errors import UnsupportedHostError
from tokenprune.tracing.interpret import Environment, evaluate, quiet_trials, run
from tokenprune.tracing.tracer import enter_block

__all__ = ["Aligned", "TokenAxes", "TokenDim", "find_token_axes", "stage_markers"]

# Extra tokens per stage in the second run: primes, so that no multiple or sum looks like another.
EXTRA = tuple(n for n in range(211, 1000) if all(n % d for d in range(2, 32)))
EXTRA_BATCH = 3
SUMS = frozenset({torch.sum, "sum"})
# Operators that run with tables shorter than the tokens, and leave tokens out.
LENIENT = frozenset({operator.setitem, torch.gather, "gather"})


def stage_markers(graph: fx.Graph, blocks: Sequence[int]) -> dict[int, fx.Node]:
    """Stage -> the node that marks the tokens entering its block."""
    stages = {block: stage for stage, block in enumerate(blocks)}
    found = {
        stages[node.args[1]]: node
        for node in graph.nodes
        if node.target is enter_block and node.args[1] in stages
    }
    return dict(sorted(found.items()))


@quiet_trials()
def find_token_axes(
    root: nn.Module,
    graph: fx.Graph,
    fake_mode: FakeTensorMode,
    burnt: Sequence[fx.Node],
    blocks: Sequence[int],
    num_prefix: int,
    *,
    padding: Collection[fx.Node] = (),
    tokens_leave: bool = True,
) -> TokenAxes:
    """Probe `graph`, whose nodes carry the value of their trace in `meta["val"]`.

    Args:
        burnt: Nodes whose value Python decided by while tracing.
        blocks: The block before which each stage prunes.
        num_prefix: P, the prefix tokens that enter each of those blocks.
        padding: Nodes that hold anything of the host's padding mask.
        tokens_leave: False in bypass mode, where every tensor keeps its size.

    Raises:
        UnsupportedHostError: A node cannot run with fewer tokens; its place in the host is named.
    """
    axes = TokenAxes()
    with torch.no_grad(), fake_mode, _quiet():
        _probe_batch(root, graph, burnt, axes)
        if tokens_leave:
            markers = stage_markers(graph, blocks)
            _TokenProbe(root, graph, markers, num_prefix, axes, padding).probe()
    return axes


@contextmanager
def _quiet() -> Iterator[None]:
    """A probe expects failures; torch logs each with a traceback of forty lines."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _probe_batch(
    root: nn.Module, graph: fx.Graph, burnt: Sequence[fx.Node], axes: TokenAxes
) -> None:
    """Run with more images: finds batch dims, and decisions that would have been other ones."""
    inputs = {node.target: node.meta["val"] for node in graph.nodes if node.op == "placeholder"}
    batch = next(iter(inputs.values())).shape[0]
    more = {
        name: value.new_empty(batch + EXTRA_BATCH, *value.shape[1:])
        if value.ndim and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }
    moved: set[fx.Node] = set()
    try:
        for node, value in run(root, graph, more):
            if node.op == "output":
                continue
            base = node.meta["val"]
            if isinstance(base, torch.Tensor):
                differ = [d for d in range(base.ndim) if base.shape[d] != value.shape[d]]
                if differ:
                    axes.batched.add(node)
                if differ == [0] and base.shape[0] == batch:
                    axes.batch_first.add(node)
                elif differ == [0] and base.shape[0] % batch == 0:
                    axes.batch_fold[node] = base.shape[0] // batch
            elif _plain(base) and value != base:
                moved.add(node)
    except (
        Exception
    ):  # whatever a host raises here says one thing: its graph holds for one batch size
        axes.batch_bound = True
        axes.batch_first = {
            node
            for node in graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].ndim
            and node.meta["val"].shape[0] == batch
        }
        return

    def moves(side: Any) -> bool:
        return any(isinstance(leaf, fx.Node) and leaf in moved for leaf in tree_leaves(side))

    seen = set(burnt)
    queue = list(burnt)
    while queue:
        node = queue.pop()
        if node in moved:
            axes.batch_bound = True
            return
        if node.target is operator.getitem:
            continue  # one size picked out of a shape: it did not move, whatever its neighbours did
        if node.target in (operator.eq, operator.ne) and all(map(moves, node.args)):
            continue  # both sides moved, and are equal or not as before
        scalars = [n for n in node.all_input_nodes if n not in seen and _plain(n.meta["val"])]
        seen.update(scalars)
        queue.extend(scalars)


def _numbers_behind(node: fx.Node) -> Iterator[fx.Node]:
    """The plain numbers that went into a node, the nearest first; tensors are not looked behind."""
    queue, seen = [node], {node}
    while queue:
        for used in queue.pop(0).all_input_nodes:
            several = isinstance(used.meta["val"], tuple | list)
            if used not in seen and (several or _plain(used.meta["val"])):
                seen.add(used)
                queue.append(used)
                if _plain(used.meta["val"]):
                    yield used


def _plain(value: Any) -> bool:
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


class _TokenProbe:
    """The run with other token counts."""

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        markers: Mapping[int, fx.Node],
        num_prefix: int,
        axes: TokenAxes,
        padding: Collection[fx.Node],
    ) -> None:
        self.root, self.graph, self.prefix, self.axes = root, graph, num_prefix, axes
        self.padding = padding
        self.markers = {node: stage for stage, node in markers.items()}
        self.follows: dict[fx.Node, int] = {}  # the latest stage whose tokens a node's data holds
        self.passed: dict[fx.Node, int] = {}  # the latest stage entered before each node
        self.latest = -1
        self.full = 0  # N, patches before the first stage

    def probe(self) -> None:
        """Run, and run again whenever a size turned out to follow the tokens after all."""
        while not self._runs_through():
            self.follows.clear()
            for found in (self.axes.dims, self.axes.aligned, self.axes.folded):
                found.clear()

    def _runs_through(self) -> bool:
        self.latest = -1
        inputs = {n.target: n.meta["val"] for n in self.graph.nodes if n.op == "placeholder"}
        for node, value in run(self.root, self.graph, inputs, self._step):
            tensor = node.op != "output" and isinstance(value, torch.Tensor)
            if tensor and not self._classify(node, value):
                return False
        return True

    def _step(self, node: fx.Node, env: Environment) -> Any:
        base = node.meta["val"]
        self.passed[node] = self.latest
        stage = self.markers.get(node)
        if stage is not None:
            return self._enter(node, stage, base)
        if node in self.axes.table_sizes:
            self.axes.sizes.add(node)
            dims = self.axes.table_sizes[node]
            return torch.Size(
                n + (EXTRA[dims[d].stage] if d in dims else 0) for d, n in enumerate(base)
            )
        sources = [self.follows[n] for n in node.all_input_nodes if n in self.follows]
        counted = None if sources or self.latest < 0 else self._counted(node)
        if counted is not None:
            self.follows[node] = self.latest
            self.axes.aligned[node] = counted
            self.axes.counts.add(node)
            trial = {n: self._gathered(env[n], counted.get(n)) for n in node.all_input_nodes}
            return evaluate(self.root, node, trial)
        if sources and (not _plain(base) or node.target is operator.setitem):
            self.follows[node] = max(sources)
            if node.target in LENIENT:
                return self._align(node, env, None)
            try:
                return evaluate(self.root, node, env)
            except Exception as error:
                return self._align(node, env, error)
        if _plain(base):
            value = evaluate(self.root, node, env)
            if value != base:
                self.axes.sizes.add(node)
            return value
        if not any(n in self.axes.sizes for n in node.all_input_nodes):
            return evaluate(self.root, node, env)
        self.axes.tables.add(node)
        return base

    def _counted(self, node: fx.Node) -> dict[fx.Node, Aligned] | None:
        """How to gather what `node` adds up, if it counts real tokens: those that left are none."""
        if node.target not in SUMS or node not in self.padding:
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
        """Gather whichever arguments make the node run, and note them.

        Args:
            error: What the node said without; None if it has not been tried, since it takes tables
                of any length.
        """
        stage = self.follows[node]
        offsets = {
            dim.prefix
            for source in node.all_input_nodes
            for dim in self.axes.dims.get(source, {}).values()
        }
        holding = [n for n in node.all_input_nodes if n in self.axes.dims]
        rank = max((env[n].ndim for n in holding), default=0)
        fold = max((self.axes.batch_fold.get(n, 1) for n in holding), default=1)
        options: dict[fx.Node, list[Aligned]] = {}
        for source in node.all_input_nodes:
            value = env.get(source)
            if source not in self.follows and isinstance(value, torch.Tensor):
                found = list(self._alignments(value, stage, offsets, rank, fold))
                if found:
                    options[source] = found
        for choice in _choices(options):
            trial = {n: self._gathered(env[n], choice.get(n)) for n in node.all_input_nodes}
            try:
                value = evaluate(self.root, node, trial)
            except Exception:
                continue
            if self._as_expected(node, value, stage):
                self.axes.aligned[node] = choice
                return value
        if error is None:
            return evaluate(self.root, node, env)
        raise UnsupportedHostError(
            f"A node cannot run with fewer tokens after stage {stage}: {node.format_node()} at "
            f"{node.meta['where']}. It said: {error}. Prune after it, or leave this host dense."
        ) from error

    def _alignments(
        self, value: torch.Tensor, stage: int, offsets: set[int], rank: int, fold: int = 1
    ) -> Iterator[Aligned]:
        sizes = {self.full + offset: offset for offset in offsets}
        dims = {d: TokenDim(stage, sizes[n]) for d, n in enumerate(value.shape) if n in sizes}
        subsets = chain.from_iterable(combinations(dims, n) for n in range(len(dims), 0, -1))
        for subset in subsets:
            yield Aligned({d: dims[d] for d in subset}, max(rank, value.ndim), fold)

    def _gathered(self, value: Any, aligned: Aligned | None) -> Any:
        if aligned is None:
            return value
        shape = [n + (EXTRA[aligned.dims[d].stage] if d in aligned.dims else 0)
                 for d, n in enumerate(value.shape)]  # fmt: skip
        return value.new_empty([1] * (aligned.rank - value.ndim) + shape)

    def _as_expected(self, node: fx.Node, value: Any, stage: int) -> bool:
        base = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.ndim != base.ndim:
            return not isinstance(base, torch.Tensor)
        moves = {new - old for new, old in zip(value.shape, base.shape, strict=True)}
        return moves <= {0, EXTRA[stage]}

    def _resize(self, node: fx.Node) -> bool:
        """Let the sizes of tables behind `node`'s numbers follow the tokens; False if none can.

        A host that splits its tokens by the length of a RoPE table means the length that the table
        has once it is gathered.
        """
        lengths = {self.full + p: p for p in range(self.prefix + 1)}
        found = False
        for number in _numbers_behind(node):
            shape = number.meta["val"]
            table = number.all_input_nodes[0] if number.all_input_nodes else None
            stage = self.passed.get(number, -1)
            of_table = isinstance(shape, torch.Size) and table not in self.follows
            if of_table and stage >= 0 and number not in self.axes.table_sizes:
                dims = {d: TokenDim(stage, lengths[n]) for d, n in enumerate(shape) if n in lengths}
                if dims:
                    self.axes.table_sizes[number] = dims
                    found = True
        return found

    def _classify(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Note the token dims of a node; False if the run must be made again."""
        if node not in self.follows:
            return True
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
                self.axes.folded.add(node)
        if dims:
            self.axes.dims[node] = dims
        return True


def _choices(options: Mapping[fx.Node, Sequence[Aligned]]) -> Iterator[dict[fx.Node, Aligned]]:
    """All arguments at once first, then each alone."""
    if not options:
        return
    width = max(len(found) for found in options.values())
    for i in range(width):
        yield {node: found[min(i, len(found) - 1)] for node, found in options.items()}
    if len(options) > 1:
        for node, found in options.items():
            for aligned in found:
                yield {node: aligned}
