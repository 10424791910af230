"""Modules that decide by what tensors hold: one node, which runs the module itself.

They can only come before the first block (SigLIP 2 resizes its position embeddings to the size of
each image). Under fake tensors they cannot run; their shape is then that of the example's output.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from tokenprune.errors import HostError
from tokenprune.tracing.interpret import OPAQUE, run
from tokenprune.tracing.proxy import ValueProxy

__all__ = ["OPAQUE", "as_traced", "run_on_example"]


def run_on_example(
    root: nn.Module,
    graph: fx.Graph,
    example: Mapping[str, Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output of `module` on the example itself; the graph so far is run to get there."""
    env = dict(run(root, graph, example))

    def real(argument: Any) -> Any:
        return env[argument.node] if type(argument) is ValueProxy else argument

    return module(*map_aggregate(args, real), **map_aggregate(kwargs, real))


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
