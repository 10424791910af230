"""What runs on rows of windows, probed with another number of them as hosts are with tokens."""

from dataclasses import replace

from torch import fx

from tokenprune.analysis.blocks import site_marker
from tokenprune.analysis.facts import NO_FACTS, Facts
from tokenprune.analysis.nodes import holds_no_tensor, makers
from tokenprune.analysis.tails import BlockSearch
from tokenprune.analysis.token_probe import facts_along

__all__ = ["facts_between"]


def facts_between(
    search: BlockSearch, known: Facts, windows: int, rows: fx.Node, inside: set[fx.Node]
) -> Facts:
    """What follows the number of windows, as stage 0: of nodes, and of numbers that they read.

    They are copied into a graph of their own, whose tokens [B, n, M * D] are windows.

    Args:
        search: In the block.
        known: Of the whole trace.
        windows: n.
        rows: Holds a row for each window of each image.
        inside: The nodes that are made of it.

    Raises:
        UnsupportedHostError: One of them cannot run with fewer windows.
    """
    graph, traced = fx.Graph(), search.traced
    copies: dict[fx.Node, fx.Node] = {}
    numbers, value = _numbers_read(search, inside), rows.meta["val"]
    outer = {n for node in (*numbers, *inside) for n in node.all_input_nodes}
    for node in outer.difference(numbers, inside, {rows}):
        copies[node] = graph.placeholder(node.name)
    given = graph.placeholder("given_windows")
    marker = graph.call_function(site_marker, (given, 0))
    copies[rows] = graph.call_method("reshape", (marker, -1, *value.shape[1:]))
    for node in (*numbers, *(n for n in search.nodes if n in inside)):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(())
    origins = {copy: node for node, copy in copies.items()}
    with traced.fake_mode:
        of_images = value.new_empty(traced.batch_size, windows, value[0].numel())
    for node in graph.nodes:
        own = {"val": of_images, "where": rows.meta["where"]}
        node.meta = dict(origins[node].meta) if node in origins else own
    before = {n: known.get(origins[n], NO_FACTS) if n in origins else NO_FACTS for n in graph.nodes}
    section = replace(traced, graph=graph)
    found = facts_along(search.root, section, [marker], (), 0, (), before, windows=True)
    return {
        origins[node]: replace(facts, gathers={origins[n]: a for n, a in facts.gathers.items()})
        for node, facts in found.items()
        if node in origins and (origins[node] in inside or origins[node] in numbers)
    }


def _numbers_read(search: BlockSearch, inside: set[fx.Node]) -> list[fx.Node]:
    """The numbers that nodes read from outside, and what these were made of, in order."""
    read = {n for node in inside for n in node.all_input_nodes} - inside
    found = {
        each
        for n in read
        if holds_no_tensor(n.meta["val"])
        for each in makers(n, lambda m: holds_no_tensor(m.meta["val"]) and m not in inside)
    }
    return [node for node in search.traced.graph.nodes if node in found]
