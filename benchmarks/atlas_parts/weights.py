"""Weights for a proof: none at all for hosts of any size, telling ones for hosts that are run."""

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["enliven", "parameters_in_millions", "weightless"]

TINY = 1e-3
HUGE = 1e4


def weightless(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a host that is on the CPU as far as anyone can ask, and holds no memory.

    It is built on the meta device; then every tensor becomes one zero that is expanded to the
    tensor's shape. Tracing and counting read shapes only.
    """
    with torch.device("meta"):
        host = make().eval()
    twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # holds the originals: ids stay theirs

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
                # a parameter made by torch.Tensor(n) does not know of the meta device (ImageGPT)
                made = isinstance(value, nn.Parameter)
                if isinstance(value, torch.Tensor) and (value.is_meta or made):
                    held[name] = twin(value)
    return host


def parameters_in_millions(host: nn.Module) -> float:
    """Shared ones count once."""
    return sum(p.numel() for p in host.parameters()) / 1e6


def enliven(host: nn.Module) -> nn.Module:
    """Give every parameter that holds one value only (LayerScale, norms, biases) random ones.

    Libraries start them at 0, 1 or 1e-5, where a block does next to nothing and an error in it is
    next to nothing too. The same for those that are random but tiny.
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
