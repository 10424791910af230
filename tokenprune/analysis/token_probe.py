"""Find which dims of which tensors count tokens, by running a graph with other numbers of them.

No operator is known here by name, but for two kinds that run with tables of any length. The graph
runs on fake tensors with another number of tokens after every stage (a distinct prime more each, so
that each size tells which stage it follows). A dim whose size moved by exactly that number counts
tokens. A node that fails combines tokens with a tensor that was made for all of them (a RoPE table,
a relative-position bias, an attention mask): that tensor is gathered too, and the run goes on.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from torch import fx, nn

from tokenprune.analysis.batch_probe import BatchFacts, holds_no_tensor, probe_batch
from tokenprune.analysis.facts import Aligned, Facts, NodeFacts, TokenDim
from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.errors import UnsupportedHostError
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import Environment, evaluate, quiet_trials, run

__all__ = ["find_facts"]

# Extra tokens per stage: primes, so that no multiple or sum looks like another.
EXTRA = tuple(n for n in range(211, 1000) if all(n % d for d in range(2, 32)))


@quiet_trials()
def find_facts(
    root: nn.Module,
    traced: HostGraph,
    markers: Sequence[fx.Node],
    num_prefix: int,
    *,
    padding: Collection[fx.Node] = (),
    tokens_leave: bool = True,
) -> tuple[Facts, bool]:
    """Probe a graph whose nodes carry the value of their trace in `meta["val"]`.

    Args:
        markers: Of the tokens that each stage prunes.
        num_prefix: P, the prefix tokens among them.
        padding: Nodes that hold anything of the host's padding mask.
        tokens_leave: False where every tensor keeps its size.

    Returns:
        One record for each node; and whether the graph holds for its batch size only.

    Raises:
        UnsupportedHostError: A node cannot run with fewer tokens; its place in the host is named.
    """
    with torch.no_grad(), traced.fake_mode:
        batch = probe_batch(root, traced)
        probe = None
        lengths: dict[fx.Node, dict[int, TokenDim]] = {}
        while tokens_leave and (probe is None or not probe.finished):
            probe = _Run(root, traced, markers, num_prefix, batch, padding, lengths)
            probe.run()
            lengths = probe.length_of
    facts = {node: _record(node, batch, probe) for node in traced.graph.nodes}
    return facts, batch.bound


def _record(node: fx.Node, batch: BatchFacts, probe: "_Run | None") -> NodeFacts:
    batched, rows = node in batch.batched, batch.rows_per_image.get(node)
    if probe is None:
        return NodeFacts(batched=batched, rows_per_image=rows)
    return NodeFacts(
        dims=probe.dims.get(node, {}),
        folded=node in probe.folded,
        batched=batched,
        rows_per_image=rows,
        follows_tokens=node in probe.sizes,
        whole_table=node in probe.tables,
        counts_real=node in probe.counts,
        gathers=probe.gathers.get(node, {}),
        length_of=probe.length_of.get(node, {}),
    )


class _Run:
    """One run with other token counts.

    Args:
        length_of: Shapes of tables, read as numbers, that follow the tokens; as far as earlier
            runs found out. A run that finds another stops, with `finished` False.
    """

    def __init__(
        self,
        root: nn.Module,
        traced: HostGraph,
        markers: Sequence[fx.Node],
        num_prefix: int,
        batch: BatchFacts,
        padding: Collection[fx.Node],
        length_of: Mapping[fx.Node, dict[int, TokenDim]],
    ) -> None:
        self.root, self.traced, self.prefix, self.batch = root, traced, num_prefix, batch
        self.padding = padding
        self.markers = {node: stage for stage, node in enumerate(markers)}
        self.length_of = dict(length_of)
        self.dims: dict[fx.Node, dict[int, TokenDim]] = {}
        self.gathers: dict[fx.Node, dict[fx.Node, Aligned]] = {}
        self.folded, self.sizes = set[fx.Node](), set[fx.Node]()
        self.tables, self.counts = set[fx.Node](), set[fx.Node]()
        self.follows: dict[fx.Node, int] = {}  # the latest stage whose tokens a node's data holds
        self.passed: dict[fx.Node, int] = {}  # the latest stage entered before each node
        self.latest = -1
        self.full = 0  # N, patches before the first stage
        self.finished = False

    def run(self) -> None:
        """Run until the end, or until one more size turns out to follow the tokens."""
        inputs = {name: node.meta["val"] for name, node in self.traced.inputs.items()}
        for node, value in run(self.root, self.traced.graph, inputs, self._step):
            tensor = node.op != "output" and isinstance(value, torch.Tensor)
            if tensor and not self._classify(node, value):
                return
        self.finished = True

    def _step(self, node: fx.Node, env: Environment) -> Any:
        base = node.meta["val"]
        self.passed[node] = self.latest
        stage = self.markers.get(node)
        if stage is not None:
            return self._enter(node, stage, base)
        if node in self.length_of:
            self.sizes.add(node)
            dims = self.length_of[node]
            return torch.Size(
                n + (EXTRA[dims[d].stage] if d in dims else 0) for d, n in enumerate(base)
            )
        sources = [self.follows[n] for n in node.all_input_nodes if n in self.follows]
        counted = None if sources or self.latest < 0 else self._counted(node)
        if counted is not None:
            self.follows[node] = self.latest
            self.gathers[node] = counted
            self.counts.add(node)
            trial = {n: self._gathered(env[n], counted.get(n)) for n in node.all_input_nodes}
            return evaluate(self.root, node, trial)
        any_length = kind_of(self.root, node) is Kind.ANY_LENGTH
        if sources and (not holds_no_tensor(base) or any_length):
            self.follows[node] = max(sources)
            if any_length:
                return self._align(node, env, None)
            try:
                return evaluate(self.root, node, env)
            except Exception as error:
                return self._align(node, env, error)
        if holds_no_tensor(base):
            value = evaluate(self.root, node, env)
            if value != base:
                self.sizes.add(node)
            return value
        if not any(n in self.sizes for n in node.all_input_nodes):
            return evaluate(self.root, node, env)
        self.tables.add(node)
        return base

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
        """Gather whichever arguments make the node run, and note them.

        Args:
            error: What the node raised without; None if it has not been tried, since it takes
                tables of any length.
        """
        stage = self.follows[node]
        offsets = {
            dim.prefix
            for source in node.all_input_nodes
            for dim in self.dims.get(source, {}).values()
        }
        holding = [n for n in node.all_input_nodes if n in self.dims]
        rank = max((env[n].ndim for n in holding), default=0)
        rows = max((self.batch.rows_per_image.get(n, 1) for n in holding), default=1)
        options: dict[fx.Node, list[Aligned]] = {}
        for source in node.all_input_nodes:
            value = env.get(source)
            if source not in self.follows and isinstance(value, torch.Tensor):
                found = list(self._alignments(value, stage, offsets, rank, rows))
                if found:
                    options[source] = found
        for choice in _choices(options):
            trial = {n: self._gathered(env[n], choice.get(n)) for n in node.all_input_nodes}
            try:
                value = evaluate(self.root, node, trial)
            except Exception:
                continue
            if self._as_expected(node, value, stage):
                self.gathers[node] = choice
                return value
        if error is None:
            return evaluate(self.root, node, env)
        raise UnsupportedHostError(
            f"A node cannot run with fewer tokens after stage {stage}: {node.format_node()} at "
            f"{node.meta['where']}. It said: {error}. Prune after it, or leave this host dense."
        ) from error

    def _alignments(
        self, value: torch.Tensor, stage: int, offsets: set[int], rank: int, rows: int = 1
    ) -> Iterator[Aligned]:
        sizes = {self.full + offset: offset for offset in offsets}
        dims = {d: TokenDim(stage, sizes[n]) for d, n in enumerate(value.shape) if n in sizes}
        subsets = chain.from_iterable(combinations(dims, n) for n in range(len(dims), 0, -1))
        for subset in subsets:
            yield Aligned({d: dims[d] for d in subset}, max(rank, value.ndim), rows)

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
        """Let the sizes of tables that went into `node` follow the tokens; False if none can.

        A host that splits its tokens by the length of a RoPE table means the length that the table
        has once it is gathered.
        """
        lengths = {self.full + p: p for p in range(self.prefix + 1)}
        found = False
        for number in _numbers_in(node):
            shape = number.meta["val"]
            table = number.all_input_nodes[0] if number.all_input_nodes else None
            stage = self.passed.get(number, -1)
            of_table = isinstance(shape, torch.Size) and table not in self.follows
            if of_table and stage >= 0 and number not in self.length_of:
                dims = {d: TokenDim(stage, lengths[n]) for d, n in enumerate(shape) if n in lengths}
                if dims:
                    self.length_of[number] = dims
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
                self.folded.add(node)
        if dims:
            self.dims[node] = dims
        return True


def _numbers_in(node: fx.Node) -> Iterator[fx.Node]:
    """The plain numbers that went into a node, the nearest first, but not those inside tensors."""
    queue, seen = [node], {node}
    while queue:
        for used in queue.pop(0).all_input_nodes:
            several = isinstance(used.meta["val"], tuple | list)
            if used not in seen and (several or holds_no_tensor(used.meta["val"])):
                seen.add(used)
                queue.append(used)
                if holds_no_tensor(used.meta["val"]):
                    yield used


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
