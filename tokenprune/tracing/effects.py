"""Which nodes of a graph must stay though nobody reads them."""

import operator

from torch import fx

from tokenprune.tracing.hook_nodes import is_hook_node

__all__ = ["IN_PLACE", "has_effect"]

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand")
"""Names of the operators that write into their left side."""
WRITES = frozenset(getattr(operator, name) for name in ("setitem", *IN_PLACE))


def has_effect(node: fx.Node) -> bool:
    """Whether a node writes into a tensor, runs hooks, or is an end of the graph."""
    if node.op not in ("call_function", "call_method"):
        return node.op in ("placeholder", "output")
    if is_hook_node(node):
        return True
    name = getattr(node.target, "__name__", str(node.target))
    writes = name.endswith("_") and not name.endswith("__")
    return writes or node.target in WRITES
