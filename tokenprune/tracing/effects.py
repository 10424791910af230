"""Which nodes of a graph must stay though nobody reads them."""

import operator

from torch import fx

__all__ = ["has_effect"]

WRITES = frozenset(
    getattr(operator, name)
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand")
)


def has_effect(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, or is an end of the graph."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module":
        return bool(node.users)
    name = getattr(node.target, "__name__", str(node.target))
    writes = name.endswith("_") and not name.endswith("__")
    return writes or node.target in WRITES
