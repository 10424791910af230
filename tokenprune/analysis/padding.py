"""Padded tokens: where a traced graph says which tokens are real, and how they are ranked last.

A host that takes texts of different lengths gets them padded to one length N, with a mask that
says which tokens are real. The counts of the stages stay shares of N, since all rows of a tensor
have one length; real tokens are kept before padded ones. So no text loses a larger share of its
tokens than one that fills all N places.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from tokenprune.tracing.host_graph import Traced

__all__ = ["about_padding", "behind_real", "find_real", "real_patches"]


def about_padding(traced: Traced, argument: str | None, num_prefix: int) -> list[fx.Node]:
    """The nodes that hold anything of a padding mask: the input `argument`, or the mask of ones
    that a host makes for itself when it is given none."""
    if argument is None:
        return []
    given = _given(traced, argument)
    own = [
        node
        for node in traced.graph.nodes
        if node.target in (torch.ones, torch.ones_like, "new_ones")
        and tuple(node.meta["val"].shape) in _shapes(traced, num_prefix)
    ]
    return _made_of(traced.graph, given or own)


def find_real(traced: Traced, argument: str, num_prefix: int) -> fx.Node | None:
    """The node that says which tokens are real: [B, L] or [B, N], zero or False where padded.

    The input itself if it has that shape. Else the last such tensor that the host made of it before
    its first block (audio models shorten a mask over samples to one over frames).

    Args:
        argument: Name of the mask among the host's inputs.
        num_prefix: P.
    """
    nodes = list(traced.graph.nodes)
    before = set(nodes[: min(map(nodes.index, traced.entries.values()))])
    fitting = [
        node
        for node in _made_of(traced.graph, _given(traced, argument))
        if node in before
        and isinstance(node.meta.get("val"), Tensor)
        and not node.meta["val"].is_floating_point()
        and tuple(node.meta["val"].shape) in _shapes(traced, num_prefix)
    ]
    given = [node for node in fitting if node.op == "placeholder"]
    return next(reversed(given or fitting), None)


def _given(traced: Traced, argument: str) -> list[fx.Node]:
    nodes = traced.graph.find_nodes(op="placeholder")
    return [node for node in nodes if node.target == argument]


def _shapes(traced: Traced, num_prefix: int) -> tuple[tuple[int, int], ...]:
    """[B, L] and [B, N]."""
    batch, length = traced.markers[0].meta["val"].shape[:2]
    return (batch, length), (batch, length - num_prefix)


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


def real_patches(mask: Tensor, num_patches: int) -> Tensor:
    """[B, N], True where a patch token is real, of a mask over all tokens or over the patches."""
    return mask[:, mask.shape[1] - num_patches :] > 0


def behind_real(keep_logits: Tensor, real: Tensor) -> Tensor:
    """[B, N, 2] scores in which every padded token comes behind every real one.

    Above -inf, which marks tokens that left before.
    """
    lowest = torch.finfo(keep_logits.dtype).min
    scores = torch.nan_to_num(keep_logits, nan=lowest / 4, neginf=lowest / 4)
    return torch.where(real.unsqueeze(-1), scores.clamp_min(lowest / 4), lowest / 2)
