"""Run a copy of a host without weights (on the meta device) and record what enters its blocks."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from tokenprune.hosts.inputs import first_floating
from tokenprune.hosts.spec import ExampleInput
from tokenprune.private import tree_leaves

__all__ = ["BATCH", "Watched", "watch"]

BATCH = 2


@dataclass
class Watched:
    """What one forward recorded.

    Attributes:
        entered: Blocks in the order they ran, with the shape of their first tensor, [B, ...].
        grid: Height and width of the last convolution's output before the first block; None if
            there was none.
        normed: Shape of what the final norm took; None if it did not run.
    """

    entered: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    normed: tuple[int, ...] | None = None

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook of the block at `path`, before it runs."""
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        first = next(tensors, None)
        self.entered.append((path, () if first is None else tuple(first.shape)))

    def leave_convolution(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Hook of a convolution, after it ran."""
        if not self.entered and output.ndim == 4:
            self.grid = (output.shape[-2], output.shape[-1])

    def leave_norm(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        """Hook of the final norm, after it ran."""
        self.normed = tuple(output.shape)


def watch(
    host: nn.Module, blocks: Sequence[str], norm: str | None, inputs: Mapping[str, ExampleInput]
) -> Watched | str:
    """What enters the `blocks` and the `norm` at these paths while a copy of `host` runs in eval
    mode, without memory or arithmetic; or the reason why it does not run without weights."""
    seen = Watched()
    try:
        host = _weightless(host).eval()
        for path, module in host.named_modules():
            if path in blocks:
                module.register_forward_pre_hook(partial(seen.enter, path), with_kwargs=True)
            elif isinstance(module, nn.Conv2d):
                module.register_forward_hook(seen.leave_convolution)
        if norm is not None:
            host.get_submodule(norm).register_forward_hook(seen.leave_norm)
        with torch.no_grad():
            dtype = first_floating(host).dtype
            host(**{name: _draw(example, dtype) for name, example in inputs.items()})
    except Exception as error:  # a host may raise anything
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return seen


def _weightless(host: nn.Module) -> nn.Module:
    """A copy whose tensors are all on the meta device.

    Hosts keep tables they have made, on themselves or in a cache of their library. The tables of
    this run are in a copy and under another device than the user's, so no later call reads them.
    """
    memo: dict[int, Any] = {}
    for module in host.modules():
        owned = (module._parameters, module._buffers, vars(module))
        for tensor in (value for names in owned for value in names.values()):
            if isinstance(tensor, torch.Tensor):
                twin = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(twin, False) if is_parameter else twin
    return copy.deepcopy(host, memo)


def _draw(example: ExampleInput, dtype: torch.dtype) -> torch.Tensor:
    shape = (BATCH, *example.shape)
    if example.ones or example.high is not None:
        return torch.ones(shape, dtype=torch.long, device="meta")
    return torch.empty(shape, device="meta", dtype=dtype)
