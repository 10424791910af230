"""The facts of one graph for another that differs in rates of dropout alone: no second probe.

A host in training mode mostly makes the graph that it makes in eval mode.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_arg

from tokenprune.analysis.facts import Facts
from tokenprune.private import tree_map
from tokenprune.tracing.calls import MODULE
from tokenprune.tracing.effects import Store

__all__ = ["facts_for"]

RANDOM = (F.dropout, F.scaled_dot_product_attention)
"""What takes a rate of dropout, which changes no shape."""


def facts_for(known: Facts, old: fx.Graph, new: fx.Graph) -> Facts | None:
    """The facts about `old` for the nodes of `new`; None if the graphs differ."""
    if len(old.nodes) != len(new.nodes):
        return None
    pairs: dict[fx.Node, fx.Node] = {}
    for before, after in zip(old.nodes, new.nodes, strict=True):
        if not _alike(before, after, pairs):
            return None
        pairs[before] = after
    return {
        pairs[node]: replace(found, gathers={pairs[n]: a for n, a in found.gathers.items()})
        for node, found in known.items()
    }


def _alike(before: fx.Node, after: fx.Node, pairs: Mapping[fx.Node, fx.Node]) -> bool:
    store = isinstance(before.target, Store) and type(before.target) is type(after.target)
    if before.op != after.op or not (before.target == after.target or store):
        return False
    if before.meta.get(MODULE) != after.meta.get(MODULE):
        return False
    read = map_arg((before.args, before.kwargs), pairs.__getitem__)
    reads = (after.args, after.kwargs)
    if before.target in RANDOM:
        read, reads = tree_map(_without_numbers, read), tree_map(_without_numbers, reads)
    try:
        return bool(read == reads) and _form(before) == _form(after)
    except (RuntimeError, ValueError):  # constants that do not compare
        return False


def _without_numbers(leaf: Any) -> Any:
    return None if isinstance(leaf, bool | float) else leaf


def _form(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
