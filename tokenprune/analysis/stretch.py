"""Stretches: blocks of a host that keeps a grid, between which tokens may leave all the same.

A hierarchical host changes its grid between stages, and reads neighbours there; within a stage
whose blocks attend to all tokens, none of that happens. There tokens leave, and at the end of such
a stretch they are put back in place, for all that reads them outside of it. So nothing outside has
to run with fewer tokens.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.grids import grid_of
from tokenprune.analysis.nodes import holds_no_tensor, shape_of
from tokenprune.analysis.operators import reads_neighbours
from tokenprune.errors import UnsupportedHostError
from tokenprune.tracing.effects import Store
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Stretch", "Stretches", "find_runs", "stretch_between"]


@dataclass(frozen=True)
class Stretch:
    """What runs on fewer tokens.

    Attributes:
        stages: The stages in it.
        inside: Those nodes, from the first marker on.
        streams: Tokens among them that others may read: what blocks return, and markers. All
            else that reads these is given all tokens.
        end: The last of them.
    """

    stages: tuple[int, ...]
    inside: frozenset[fx.Node]
    streams: frozenset[fx.Node]
    end: fx.Node

    def gives_all(self, used: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` is given all tokens of `used`."""
        return used in self.streams and reader not in self.inside


def stretch_between(
    traced: HostGraph, markers: Mapping[int, fx.Node], blocks: Sequence[Block]
) -> Stretch:
    """The stretch from the first marker to what the last of `blocks` returns; `blocks` are those
    from the marker's on.

    Args:
        markers: Stage -> marker, of the stages in it.
    """
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    outputs = [block.call.output for block in blocks if block.call.output is not None]
    entries = [block.entry for block in blocks[1:]]
    inside = _between(order, next(iter(markers.values())), outputs[-1])
    streams = frozenset({*markers.values(), *entries, *outputs})
    return Stretch(tuple(markers), inside, streams, outputs[-1])


def _between(order: Mapping[fx.Node, int], start: fx.Node, end: fx.Node) -> frozenset[fx.Node]:
    """The nodes on the ways from one node to another, both included, and what writes in place."""
    made, queue = {start}, [start]
    for node in queue:
        fresh = [n for n in node.users if n not in made and order[n] <= order[end]]
        made.update(fresh)
        queue += fresh
    queue = [end, *(n for n in made if not n.users and not isinstance(n.target, Store))]
    found = set(queue)
    for node in queue:
        fresh = [n for n in node.all_input_nodes if n in made and n not in found]
        found.update(fresh)
        queue += fresh
    return frozenset(found)


@dataclass(frozen=True)
class Stretches:
    """The blocks of a host from which tokens may leave, as far as shapes and operators tell; that
    attention is over all tokens there is tried afterwards.

    Attributes:
        runs: Blocks one after the other on one grid; nothing in or between them reads neighbours.
        reasons: Block -> why tokens cannot leave at it; or, of the last one of a run, why the run
            ends there.
    """

    runs: list[list[Block]]
    reasons: dict[int, str]


def find_runs(root: nn.Module, traced: HostGraph, blocks: Blocks, num_prefix: int) -> Stretches:
    """See `Stretches`."""
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    found = Stretches([], {})
    last: Block | None = None
    for block in sorted(blocks.values(), key=lambda block: order[block.entry]):
        reason = _against(root, traced, block, num_prefix, order)
        if reason is not None:
            found.reasons[block.number] = reason
            last = None
            continue
        between = None if last is None else _against_both(root, last, block, order)
        if last is None or between is not None:
            found.runs.append([])
            if last is not None and between is not None:
                found.reasons[last.number] = between
        found.runs[-1].append(block)
        last = block
    return found


def _against(
    root: nn.Module,
    traced: HostGraph,
    block: Block,
    num_prefix: int,
    order: Mapping[fx.Node, int],
) -> str | None:
    """Why tokens cannot leave at a block; None if nothing tells."""
    try:
        grid = grid_of(root, traced.batch_size, block, num_prefix)
    except UnsupportedHostError as error:
        return str(error)
    entry, output = shape_of(block.entry), block.call.output
    if grid.layout.rows_per_image > 1:
        return f"it holds the tokens of an image in {grid.layout.rows_per_image} rows"
    if grid.num_patches < 2:
        return f"{grid.num_patches} patch tokens enter it"
    if output is None or shape_of(output) != entry:
        found = None if output is None else shape_of(output)
        return f"it takes tokens of shape {entry} and returns {found}"
    return _neighbours(root, block.entry, _between(order, block.entry, output), order)


def _against_both(
    root: nn.Module, block: Block, after: Block, order: Mapping[fx.Node, int]
) -> str | None:
    """Why a run ends between two blocks; None if it goes on."""
    output = block.call.output
    if output is None or shape_of(output) != shape_of(after.entry):
        return f"tokens of shape {shape_of(after.entry)} enter block {after.number} after it"
    ways = _between(order, output, after.entry)
    if output not in ways:
        return f"what it returns does not enter block {after.number}"
    return _neighbours(root, output, ways, order)


def _neighbours(
    root: nn.Module, start: fx.Node, ways: Collection[fx.Node], order: Mapping[fx.Node, int]
) -> str | None:
    """What reads neighbours among the nodes that tokens go through from `start` on, in words."""
    made = {start}
    for node in sorted(ways, key=order.__getitem__):
        if made.isdisjoint(node.all_input_nodes) or holds_no_tensor(node.meta.get("val")):
            continue
        made.add(node)
        if reads_neighbours(root, node):
            what = str(getattr(node.target, "__name__", node.target))
            if node.op == "call_module":
                what = f"{type(root.get_submodule(what)).__name__} '{what}'"
            return f"{what} reads the neighbours of each token, in {node.meta['where']}"
    return None
