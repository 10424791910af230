"""Find which dims count images, by running a graph with more of them on fake tensors."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import quiet_trials, run

__all__ = ["BatchFacts", "holds_no_tensor", "probe_batch"]

EXTRA_BATCH = 3


@dataclass(frozen=True)
class BatchFacts:
    """What the probe found.

    Attributes:
        rows_per_image: Tensor -> rows of dim 0 for each image, where that dim alone counts images.
        batched: Tensors some dim of which counts images, alone or times something else.
        bound: The graph holds for this batch size only: it does not run with another, or Python
            branches on one.
    """

    rows_per_image: dict[fx.Node, int] = field(default_factory=dict)
    batched: frozenset[fx.Node] = frozenset()
    bound: bool = False


@quiet_trials()
def probe_batch(root: nn.Module, traced: HostGraph) -> BatchFacts:
    """Run with more images."""
    batch = traced.batch_size
    inputs = {name: node.meta["val"] for name, node in traced.inputs.items()}
    more = {
        name: value.new_empty(batch + EXTRA_BATCH, *value.shape[1:])
        if value.ndim and value.shape[0] == batch
        else value
        for name, value in inputs.items()
    }
    rows: dict[fx.Node, int] = {}
    batched, moved = set[fx.Node](), set[fx.Node]()
    try:
        for node, value in run(root, traced.graph, more):
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
        tensors = {n: n.meta.get("val") for n in traced.graph.nodes}
        first = {
            node: 1
            for node, value in tensors.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch
        }
        more_rows = {node: number for node, number in rows.items() if number > 1}
        return BatchFacts(more_rows | first, frozenset(batched), bound=True)
    return BatchFacts(rows, frozenset(batched), _branches_on(traced.specialized, moved))


def _branches_on(specialized: Sequence[fx.Node], moved: set[fx.Node]) -> bool:
    """Whether Python read a number that moves with the batch size."""

    def moves(side: Any) -> bool:
        return any(isinstance(leaf, fx.Node) and leaf in moved for leaf in tree_leaves(side))

    seen, queue = set(specialized), list(specialized)
    while queue:
        node = queue.pop()
        if node in moved:
            return True
        if node.target is operator.getitem:
            continue  # one size picked out of a shape: it did not move, whatever its neighbours did
        if node.target in (operator.eq, operator.ne) and all(map(moves, node.args)):
            continue  # both sides moved, and are equal or not as before
        numbers = [
            n for n in node.all_input_nodes if n not in seen and holds_no_tensor(n.meta["val"])
        ]
        seen.update(numbers)
        queue.extend(numbers)
    return False


def holds_no_tensor(value: Any) -> bool:
    """Whether a node's value is plain Python: numbers, shapes, None."""
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
