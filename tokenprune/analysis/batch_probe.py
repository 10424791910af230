"""Find which dims count images, by running a graph with more of them on fake tensors."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from tokenprune.analysis.facts import NodeFacts
from tokenprune.analysis.nodes import IDENTITY, holds_no_tensor, shape_of
from tokenprune.private import tree_leaves
from tokenprune.tracing.guards import Guards
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import run

__all__ = ["probe_batch"]

EXTRA_BATCH = 3


def probe_batch(root: nn.Module, traced: HostGraph) -> tuple[dict[fx.Node, NodeFacts], bool]:
    """What each node has to do with images; and whether the graph holds for its batch size only: it
    does not run with another, or Python branches on one.

    Copies of a trace are probed once: what is marked in them are identities.
    """
    known = _probed.setdefault(traced.guards, [])
    for names, bound in known:
        facts = _named(traced, names)
        if facts is not None:
            return facts, bound
    facts, bound = _probe(root, traced)
    own = {node.name: found for node, found in facts.items() if IDENTITY not in node.meta}
    known.append((own, bound))
    return facts, bound


# By what traces share with their copies.
_probed: WeakKeyDictionary[Guards, list[tuple[dict[str, NodeFacts], bool]]] = WeakKeyDictionary()


def _named(traced: HostGraph, names: Mapping[str, NodeFacts]) -> dict[fx.Node, NodeFacts] | None:
    """The facts of nodes by their names, a marker's being those of what it marks; None if there are
    other nodes."""
    facts: dict[fx.Node, NodeFacts] = {}
    for node in traced.graph.nodes:
        if node.meta.get(IDENTITY, False):
            facts[node] = facts[node.all_input_nodes[0]]
        elif IDENTITY in node.meta or node.name not in names:
            return None
        else:
            facts[node] = names[node.name]
    return facts


def _probe(root: nn.Module, traced: HostGraph) -> tuple[dict[fx.Node, NodeFacts], bool]:
    batch, nodes = traced.batch_size, traced.graph.nodes
    inputs = {name: node.meta["val"] for name, node in traced.inputs.items()}
    images = {name: x for name, x in inputs.items() if x.ndim and x.shape[0] == batch}
    more = {name: x.new_empty(batch + EXTRA_BATCH, *x.shape[1:]) for name, x in images.items()}
    rows: dict[fx.Node, int] = {}
    ran, batched, moved = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    try:
        for node, value in run(root, traced.graph, inputs | more):
            ran.add(node)
            if node.op == "output":
                continue
            base = node.meta["val"]
            if isinstance(base, torch.Tensor):
                differ = [d for d in range(base.ndim) if base.shape[d] != value.shape[d]]
                if differ:
                    batched.add(node)
                if differ == [0] and base.shape[0] % batch == 0:
                    rows[node] = base.shape[0] // batch
            elif holds_no_tensor(base) and value != base:
                moved.add(node)
    except Exception:  # whatever a host raises here means that its graph holds for one batch size
        bound = True
        left = [node for node in nodes if node not in ran]
        rows |= {node: 1 for node in left if shape_of(node)[:1] == (batch,)}
    else:
        bound = _branches_on(traced.specialized, moved)
    facts = {n: NodeFacts(batched=n in batched, rows_per_image=rows.get(n)) for n in nodes}
    return facts, bound


def _branches_on(specialized: Sequence[fx.Node], moved: set[fx.Node]) -> bool:
    """Whether Python read a number that moves with the batch size."""
    queue, seen = list(specialized), set(specialized)
    for node in queue:
        if node in moved:
            return True
        if node.target is operator.getitem:
            continue  # one size picked out of a shape: it did not move, whatever its neighbours did
        if node.target in (operator.eq, operator.ne) and all(_moves(s, moved) for s in node.args):
            continue  # both sides moved, and are equal or not as before
        fresh = [
            n for n in node.all_input_nodes if n not in seen and holds_no_tensor(n.meta["val"])
        ]
        seen.update(fresh)
        queue += fresh
    return False


def _moves(side: Any, moved: set[fx.Node]) -> bool:
    return any(isinstance(leaf, fx.Node) and leaf in moved for leaf in tree_leaves(side))
