"""Padded tokens: where a traced graph says which tokens are real.

A host that takes texts of different lengths gets them padded to one length N, with a mask that
says which tokens are real. The counts of the stages stay shares of N, since all rows of a tensor
have one length; real tokens are kept before padded ones. So no text loses a larger share of its
tokens than one that fills all N places.
"""

import operator
from collections.abc import Collection

from torch import fx, nn

from tokenprune.analysis.nodes import shape_of
from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["find_padding"]


def find_padding(
    root: nn.Module,
    traced: HostGraph,
    argument: str | None,
    first: fx.Node,
    shapes: Collection[tuple[int, ...]],
) -> tuple[list[fx.Node], fx.Node | None]:
    """The nodes that hold anything of a padding mask, and the one that says which tokens are real;
    none if there is no mask.

    The mask is the input `argument`, or the mask of ones that a host makes when it is given none;
    of the latter no node says which tokens are real, since all are. The input itself says it if its
    shape is one of `shapes`. Else the last such tensor that the host made of it before its first
    block does (audio models shorten a mask over samples to one over frames).

    Args:
        first: The entry of the first block.
        shapes: [B, L] and [B, N]: over all tokens or over the patches.
    """
    if argument is None:
        return [], None
    nodes = list(traced.graph.nodes)
    given = [node for name, node in traced.inputs.items() if name == argument]
    ones = (n for n in nodes if kind_of(root, n) is Kind.ONES and shape_of(n) in shapes)
    held = dict.fromkeys(given or ones)
    for node in nodes:
        if is_hook_node(node):
            continue  # what it hands on is held if what it was given is
        if any(used in held for used in node.all_input_nodes):
            held[node] = None
            if node.target is operator.setitem and isinstance(node.args[0], fx.Node):
                held[node.args[0]] = None  # what is written into holds it from there on
    before = set(nodes[: nodes.index(first)]) if given else set()
    fitting = [node for node in held if node in before and shape_of(node) in shapes]
    fitting = [node for node in fitting if not node.meta["val"].is_floating_point()]
    inputs = [node for node in fitting if node.op == "placeholder"]
    return list(held), next(reversed(inputs or fitting), None)
