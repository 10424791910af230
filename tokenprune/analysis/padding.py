"""Padded tokens: where a traced graph says which tokens are real.

A host that takes texts of different lengths gets them padded to one length N, with a mask that
says which tokens are real. The counts of the stages stay shares of N, since all rows of a tensor
have one length; real tokens are kept before padded ones. So no text loses a larger share of its
tokens than one that fills all N places.
"""

import operator
from collections.abc import Collection, Sequence

from torch import Tensor, fx, nn

from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["about_padding", "find_real"]


def about_padding(
    root: nn.Module, traced: HostGraph, argument: str | None, shapes: Collection[tuple[int, ...]]
) -> list[fx.Node]:
    """The nodes that hold anything of a padding mask: the input `argument`, or the mask of ones
    that a host makes when it is given none.

    Args:
        shapes: Of a mask over all tokens or over the patches: [B, L] and [B, N].
    """
    if argument is None:
        return []
    given = [node for name, node in traced.inputs.items() if name == argument]
    own = [
        node
        for node in traced.graph.nodes
        if kind_of(root, node) is Kind.ONES and tuple(node.meta["val"].shape) in shapes
    ]
    return _made_of(traced.graph, given or own)


def find_real(
    traced: HostGraph, argument: str, first: fx.Node, shapes: Collection[tuple[int, ...]]
) -> fx.Node | None:
    """The node that says which tokens are real: [B, L] or [B, N], zero or False where padded.

    The input itself if it has that shape. Else the last such tensor that the host made of it before
    its first block (audio models shorten a mask over samples to one over frames).

    Args:
        argument: Name of the mask among the host's inputs.
        first: The entry of the first block.
        shapes: [B, L] and [B, N].
    """
    nodes = list(traced.graph.nodes)
    before = set(nodes[: nodes.index(first)])
    given = [node for name, node in traced.inputs.items() if name == argument]
    fitting = [
        node
        for node in _made_of(traced.graph, given)
        if node in before
        and isinstance(node.meta.get("val"), Tensor)
        and not node.meta["val"].is_floating_point()
        and tuple(node.meta["val"].shape) in shapes
    ]
    inputs = [node for node in fitting if node.op == "placeholder"]
    return next(reversed(inputs or fitting), None)


def _made_of(graph: fx.Graph, sources: Sequence[fx.Node]) -> list[fx.Node]:
    """`sources` and all that is made of them; a tensor that such a node is written into holds it
    from there on."""
    found: dict[fx.Node, None] = dict.fromkeys(sources)
    for node in graph.nodes:
        if any(used in found for used in node.all_input_nodes):
            found[node] = None
            if node.target is operator.setitem and isinstance(node.args[0], fx.Node):
                found[node.args[0]] = None
    return list(found)
