"""Hosts without weights, to trace and count; random weights in which an error shows, to verify."""

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["enliven", "parameters_in_millions", "weightless"]

TINY = 1e-3
HUGE = 1e4


def weightless(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a host whose tensors report the CPU as their device but hold no memory.

    It is built on the meta device; then every tensor becomes one zero, expanded to its shape.
    Tracing and counting read shapes only.
    """
    with torch.device("meta"):
        host = make().eval()
    twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps originals: unique ids

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in twins:
            zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            if isinstance(tensor, nn.Parameter):
                zero = nn.Parameter(zero, tensor.requires_grad)
            twins[id(tensor)] = tensor, zero
        return twins[id(tensor)][1]

    for module in host.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in held.items():
                # a parameter made by torch.Tensor(n) ignores the meta device (ImageGPT)
                made = isinstance(value, nn.Parameter)
                if isinstance(value, torch.Tensor) and (value.is_meta or made):
                    held[name] = twin(value)
    return host


def parameters_in_millions(host: nn.Module) -> float:
    """Shared ones count once."""
    return sum(p.numel() for p in host.parameters()) / 1e6


def enliven(host: nn.Module) -> nn.Module:
    """Draw random values for parameters that are constant (LayerScale, norms, biases) or tiny.

    Libraries initialise them with 0, 1 or 1e-5. Then the output of a block, and an error in it, is
    too small to be seen.
    """
    with torch.no_grad():
        for parameter in host.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            first, spread = parameter.flatten()[0], parameter.max() - parameter.min()
            if spread == 0 and first != 0:
                parameter.uniform_(0.5, 1.5)
            elif spread < TINY:
                parameter.normal_(std=0.1)
            elif not parameter.isfinite().all() or spread > HUGE:  # made by torch.Tensor(n)
                parameter.uniform_(0.5, 1.5)
    return host
