"""Which nodes of a graph must stay though nobody reads them."""

import operator

from torch import fx

__all__ = ["IN_PLACE", "has_effect"]

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand")
"""Names of the operators that write into their left side."""
WRITES = frozenset(getattr(operator, name) for name in ("setitem", *IN_PLACE))


def has_effect(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, or is an end of the graph."""
    if node.op not in ("call_function", "call_method"):
        return node.op in ("placeholder", "output")
    name = getattr(node.target, "__name__", str(node.target))
    writes = name.endswith("_") and not name.endswith("__")
    return writes or node.target in WRITES
