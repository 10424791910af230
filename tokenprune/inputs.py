"""Example inputs: drawn from an adapter's facts, or given by the caller in one of several forms."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.arch import ArchSpec
from tokenprune.errors import HostError, UnsupportedHostError
from tokenprune.model import PrunedModel, pruning_of

__all__ = ["ExampleInputs", "draw_inputs", "named_inputs"]

ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Any]


def draw_inputs(spec: ArchSpec, host: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Random inputs of the shapes in `spec.inputs`, on the host's device and in its dtype.

    Draws from a generator of its own: the caller's random state stays as it is.

    Raises:
        UnsupportedHostError: The adapter knows no input shape.
    """
    if not spec.inputs:
        raise UnsupportedHostError(
            f"Adapter {spec.adapter!r} knows no input shape of {type(host).__name__}. Pass "
            "example_inputs=, a tensor or a dict of the arguments its forward takes."
        )
    like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, example in spec.inputs.items():
        shape = (batch_size, *example.shape)
        if example.ones:
            value = torch.ones(shape, dtype=torch.long)
        elif example.high is not None:
            value = torch.randint(0, example.high, shape, generator=generator)
        else:
            value = torch.randn(shape, generator=generator).to(like.dtype)
        drawn[name] = value.to(like.device)
    return drawn


def named_inputs(model: nn.Module, given: ExampleInputs | None) -> dict[str, Any]:
    """The arguments of a call of a wrapped model, by name.

    Args:
        given: A tensor, several, or a mapping; a batch of two is drawn if None.

    Raises:
        HostError: It holds no tensor, or an argument the host does not take.
    """
    pruning = pruning_of(model)
    if given is None:
        return draw_inputs(pruning.spec, model, batch_size=2)
    if isinstance(given, Mapping):
        arguments = dict(given)
    else:
        several = (given,) if isinstance(given, Tensor) else tuple(given)
        arguments = dict(zip(pruning.parameters, several, strict=False))
    if not any(isinstance(value, Tensor) for value in arguments.values()):
        raise HostError(
            f"example_inputs must hold at least one tensor, found {sorted(arguments) or 'nothing'}."
        )
    return model._arguments((), arguments) if isinstance(model, PrunedModel) else arguments
