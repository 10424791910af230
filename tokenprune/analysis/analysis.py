"""Everything that the rewriter reads about one trace and one plan."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx, nn

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.facts import Facts
from tokenprune.analysis.grids import Grid, grid_of
from tokenprune.analysis.leaving import stretches_at
from tokenprune.analysis.nodes import shape_of
from tokenprune.analysis.padding import find_padding
from tokenprune.analysis.plan import Plan
from tokenprune.analysis.reuse import facts_for
from tokenprune.analysis.sites import PLACES
from tokenprune.analysis.stretch import Stretch
from tokenprune.analysis.token_probe import find_facts
from tokenprune.errors import PlanError, TraceError, UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops.layout import Layout
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Analysis", "analyse"]


@dataclass(frozen=True)
class Analysis:
    """What is known about one trace, for one plan.

    Attributes:
        traced: The trace.
        blocks: Number -> block, for those that run.
        plan: Where the stages are.
        markers: Of the tokens that each stage prunes.
        grids: The tokens that each stage sees.
        facts: One record for each node.
        final: The node that holds the tokens after the last block and its norm.
        real: The node that says which tokens are no padding, [B, L] or [B, N]; None if the host was
            not told.
        batch_bound: The graph holds for its batch size only.
        stretches: Where tokens leave a host that keeps a grid, and are put back; none elsewhere.
        repeats: The analysis of an earlier trace with the same operators; None if there is none.
    """

    traced: HostGraph
    blocks: Blocks
    plan: Plan
    markers: tuple[fx.Node, ...]
    grids: tuple[Grid, ...]
    facts: Facts
    final: fx.Node
    real: fx.Node | None
    batch_bound: bool
    stretches: tuple[Stretch, ...] = ()
    repeats: "Analysis | None" = None

    @property
    def starts(self) -> tuple[int, ...]:
        """The stages that see all tokens: the first one, or that of each stretch."""
        return tuple(stretch.stages[0] for stretch in self.stretches) or (0,)

    @property
    def final_layout(self) -> Layout:
        """Of the final tokens of a host that keeps a grid: as those of the last stage lie, if the
        final ones are a grid too."""
        shape = self.final.meta["val"].shape
        rows = max(shape[0] // self.traced.batch_size, 1)
        return Layout(rows, self.grids[-1].layout.channels_first and len(shape) == 4)

    @property
    def num_patches(self) -> tuple[int, ...]:
        """N of each stage; all the same in one stretch where tokens leave."""
        return tuple(grid.num_patches for grid in self.grids)


def analyse(
    root: nn.Module,
    traced: HostGraph,
    blocks: Blocks,
    plan: Plan,
    spec: ArchSpec,
    tokens_leave: bool,
    restore: bool | None = None,
    *,
    known: Iterable["Analysis"] = (),
) -> Analysis:
    """Probe a trace whose blocks are found; unless `tokens_leave`, every tensor keeps its size.

    Args:
        restore: Where what follows the blocks needs all tokens, they are put back after them.
        known: Of other traces of this host; what is known of the same graph is not probed again.

    Raises:
        TraceError: The block of a stage takes no tensor.
        PlanError: A stage sees no patch tokens; or, where tokens leave, stages see different ones,
            or a host that keeps a grid lets none leave there.
        UnsupportedHostError: A node cannot run with fewer tokens, or the final norm does not run.
    """
    missing = [block for block in plan.blocks if block not in blocks]
    if missing:
        raise TraceError(
            f"Blocks {missing} ({', '.join(spec.blocks[b] for b in missing)}) take no tensor in "
            f"the forward of {traced.host}, so nothing can be pruned before them."
        )
    markers = tuple(PLACES[s.place].mark(traced, blocks[s.block]) for s in plan.sites)
    staged = [blocks[site.block] for site in plan.sites]
    grids = tuple(grid_of(root, traced.batch_size, block, plan.num_prefix) for block in staged)
    for grid, block in zip(grids, staged, strict=True):
        if grid.num_patches < 2:
            raise PlanError(
                f"There are {grid.num_patches} patch tokens after {plan.num_prefix} prefix tokens "
                f"at block {block.number} ({block.entry.meta['where']}); nothing can be pruned. "
                "Check num_prefix_tokens."
            )
    _check_order(traced, staged)
    stretches: tuple[Stretch, ...] = ()
    if tokens_leave and spec.tokens_leave:
        _check_one_stretch(blocks, staged)
    where = (plan.blocks, markers, plan.num_prefix)
    if tokens_leave and not spec.tokens_leave:
        stretches = stretches_at(root, traced, blocks, *where)
    final = _final(root, traced, blocks, spec)
    mask = spec.padding_mask if tokens_leave else None  # else no padding displaces real tokens
    batch, length = markers[0].meta["val"].shape[:2]
    shapes = ((batch, length), (batch, length - plan.num_prefix))
    first = min((block.entry for block in blocks.values()), key=list(traced.graph.nodes).index)
    padding, real = find_padding(root, traced, mask, first, shapes)
    repeats: Analysis | None = None
    for other in known:
        facts = facts_for(other.facts, other.traced.graph, traced.graph)
        if facts is not None and bool(other.stretches) == bool(stretches):
            repeats, bound = other, other.batch_bound
            break
    else:
        given = (root, traced, markers, grids, plan.num_prefix, padding, tokens_leave)
        try:
            facts, bound = find_facts(*given, stretches)
        except UnsupportedHostError:
            if stretches or not (tokens_leave and restore):
                raise
            try:
                stretches = stretches_at(root, traced, blocks, *where)
            except PlanError:
                stretches = ()
            if not stretches:
                raise
            facts, bound = find_facts(*given, stretches)
    found = (traced, blocks, plan, markers, grids, facts, final, real, bound, stretches)
    return Analysis(*found, repeats)


def _final(root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec) -> fx.Node:
    """The output of the final norm; of the last block that returns tokens, if no norm runs; what
    enters that block, if nobody reads what it returns."""
    if spec.norm is not None:
        paths = {module: path for path, module in root.named_modules()}
        found = traced.output_of(paths[root.get_submodule(spec.norm)])
        if found is not None:
            return found
    last = blocks[max(blocks)]
    return last.entry if last.call.output is None else last.call.output


def _check_order(traced: HostGraph, staged: Sequence[Block]) -> None:
    """Stages come one after the other: what one drops is gone at the next."""
    nodes = list(traced.graph.nodes)
    for stage, (before, after) in enumerate(pairwise(staged), start=1):
        if nodes.index(after.entry) < nodes.index(before.entry):
            raise PlanError(
                f"Stage {stage} (block {after.number}, '{after.path}') runs before stage "
                f"{stage - 1} (block {before.number}, '{before.path}'): {traced.host} runs its "
                "blocks in another order than it lists them. List them in the order in which they "
                "run, or pass adapter=ArchSpec(..., blocks=...) with their paths in that order."
            )


def _check_one_stretch(blocks: Blocks, staged: Sequence[Block]) -> None:
    """Where tokens leave, all stages must see the same tokens."""
    entering = {number: shape_of(block.entry)[1:] for number, block in blocks.items()}
    first = entering[staged[0].number]
    for stage, block in enumerate(staged):
        found = entering[block.number]
        if found != first:
            same = [number for number, shape in entering.items() if shape == first]
            raise PlanError(
                f"Stage {stage} (block {block.number}) sees tokens of shape {found}, "
                f"stage 0 (block {staged[0].number}) of {first}: the host changes its grid in "
                f"between. Put all stages into one stretch, such as blocks {same[0]} to {same[-1]}."
            )
