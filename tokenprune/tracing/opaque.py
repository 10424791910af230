"""Modules that decide by what tensors hold: one node, which runs the module itself.

They stand in front of the first block (SigLIP 2 resizes its position embeddings to the size of each
image). Under fake tensors they cannot run; there the shape that they made of the example tells.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from tokenprune.errors import HostError
from tokenprune.tracing.interpret import OPAQUE, run
from tokenprune.tracing.proxy import ValueProxy

__all__ = ["as_traced", "made_for_real", "mark_opaque"]


def made_for_real(
    root: nn.Module,
    graph: fx.Graph,
    example: Mapping[str, Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `module` makes of the example itself; the graph so far is run to get there."""
    env = dict(run(root, graph, example))

    def real(argument: Any) -> Any:
        return env[argument.node] if type(argument) is ValueProxy else argument

    return module(*map_aggregate(args, real), **map_aggregate(kwargs, real))


def mark_opaque(node: fx.Node) -> None:
    """Say of a node that its value cannot be had under fake tensors."""
    node.meta[OPAQUE] = True


def as_traced(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`value`, if it has the traced shape, the batch aside.

    Raises:
        HostError: It has another: what follows was traced for that shape.
    """
    if tuple(value.shape[1:]) != tuple(shape):
        raise HostError(
            f"A module whose code decides by values returned {tuple(value.shape)}, but (B, "
            f"{', '.join(map(str, shape))}) when it was traced. Wrap the host with an input like "
            "this one."
        )
    return value
