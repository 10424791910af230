"""Which nodes of a graph must stay though nobody reads them."""

import operator
from collections import deque
from typing import Any

from torch import Tensor, fx

from tokenprune.tracing.finite import check_finite
from tokenprune.tracing.hook_nodes import is_hook_node

__all__ = [
    "IN_PLACE",
    "Add",
    "Count",
    "Delete",
    "Refill",
    "Store",
    "has_effect",
    "of_content",
    "refill",
    "written_weight",
]

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand")
"""Names of the operators that write into their left side."""
ENDS = frozenset([check_finite, *(getattr(operator, name) for name in ("setitem", *IN_PLACE))])


class Store:
    """A node's target: sets what a host's forward leaves in an attribute of a module, or of an
    object that one holds: a map to be shown, say, or a size."""

    __name__ = "store"

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, value: Any) -> None:
        setattr(self.owner, self.name, value)

    @property
    def held(self) -> Any:
        """The list, dict or set that is there: an attribute, or the owner itself."""
        return getattr(self.owner, self.name) if self.name else self.owner


class Delete(Store):
    """Takes an attribute away."""

    def __call__(self, value: Any) -> None:
        vars(self.owner).pop(self.name, None)


class Count(Store):
    """Counts an attribute up."""

    def __call__(self, step: Any) -> None:
        setattr(self.owner, self.name, getattr(self.owner, self.name) + step)


class Refill(Store):
    """Gives the list, dict or set that is there other contents: others may hold this very one."""

    def __call__(self, contents: Any) -> None:
        refill(self.held, contents)


class Add(Store):
    """Adds to the list, dict or set that is there."""

    def __call__(self, contents: Any) -> None:
        add(self.held, contents)


def add(kept: Any, contents: Any) -> None:
    """Put more into a list, dict, set or deque."""
    if isinstance(kept, dict):
        for key, value in contents.items():  # `update` of a Counter adds
            kept[key] = value
    else:
        (kept.extend if isinstance(kept, list | deque) else kept.update)(contents)


def refill(kept: Any, contents: Any) -> None:
    """Give a list, dict, set or deque other contents."""
    kept.clear()
    add(kept, contents)


def has_effect(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, runs hooks, checks, or is an end of the graph."""
    if node.op not in ("call_function", "call_method"):
        return node.op in ("placeholder", "output")
    if is_hook_node(node):
        return True
    name = getattr(node.target, "__name__", str(node.target))
    writes = name.endswith("_") and not name.endswith("__")
    writes = writes or node.target in ENDS or node.kwargs.get("out") is not None
    return writes or isinstance(node.target, Store)


def written_weight(node: fx.Node) -> str | None:
    """The path of the weight that a node writes into, or into a view of it."""
    base: Any = node if has_effect(node) and node.args else None
    while isinstance(base, fx.Node) and base.args:
        base = base.args[0]
    return str(base.target) if isinstance(base, fx.Node) and base.op == "get_attr" else None


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
