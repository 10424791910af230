"""Which nodes of a graph must stay though nobody reads them."""

import operator
from typing import Any

from torch import Tensor, fx, nn

from tokenprune.tracing.hook_nodes import is_hook_node

__all__ = ["IN_PLACE", "Count", "Store", "has_effect", "of_content"]

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand")
"""Names of the operators that write into their left side."""
WRITES = frozenset(getattr(operator, name) for name in ("setitem", *IN_PLACE))


class Store:
    """A node's target: sets what a host's forward leaves in an attribute of one of its modules, a
    map to be shown, say, or a size."""

    __name__ = "store"

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, value: Any) -> None:
        kept = getattr(self.module, self.name, None)
        if isinstance(kept, list) and isinstance(value, list):
            kept[:] = value  # others may hold this very list
        else:
            setattr(self.module, self.name, value)


class Count(Store):
    """Counts an attribute of a module up."""

    def __call__(self, step: Any) -> None:
        setattr(self.module, self.name, getattr(self.module, self.name) + step)


def has_effect(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, runs hooks, or is an end of the graph."""
    if node.op not in ("call_function", "call_method"):
        return node.op in ("placeholder", "output")
    if is_hook_node(node):
        return True
    name = getattr(node.target, "__name__", str(node.target))
    writes = name.endswith("_") and not name.endswith("__")
    return writes or node.target in WRITES or isinstance(node.target, Store)


def of_content(graph: fx.Graph) -> set[fx.Node]:
    """The tensors that depend on what the inputs hold, not on their shapes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        shape_only = name.startswith("new_") or name.endswith("_like")
        reads = node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes)
        if reads and isinstance(node.meta.get("val"), Tensor) and not shape_only:
            found.add(node)
    return found
