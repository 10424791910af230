"""Run a copy of a host without weights (on the meta device) and record what enters its blocks."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tokenprune.hosts.spec import ExampleInput

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


def watch(
    host: nn.Module, blocks: Sequence[str], norm: str | None, inputs: Mapping[str, ExampleInput]
) -> Watched | str:
    """Run a copy of `host` in eval mode without memory or arithmetic.

    Args:
        blocks: Paths of the blocks to watch.
        norm: Path of the norm to watch.
        inputs: What the host takes.

    Returns:
        What was recorded, or the reason why the host does not run without weights.
    """
    seen = Watched()
    try:
        host = _weightless(host).eval()
        for path, module in host.named_modules():
            if path in blocks:
                module.register_forward_pre_hook(_note_entry(seen, path), with_kwargs=True)
            elif isinstance(module, nn.Conv2d):
                module.register_forward_hook(_note_grid(seen))
        if norm is not None:
            host.get_submodule(norm).register_forward_hook(_note_norm(seen))
        with torch.no_grad():
            host(**{name: _draw(example) for name, example in inputs.items()})
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
        for tensor in (
            *module._parameters.values(),
            *module._buffers.values(),
            *vars(module).values(),
        ):
            if isinstance(tensor, torch.Tensor):
                twin = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(twin, False) if is_parameter else twin
    return copy.deepcopy(host, memo)


def _draw(example: ExampleInput) -> torch.Tensor:
    shape = (BATCH, *example.shape)
    if example.ones or example.high is not None:
        return torch.ones(shape, dtype=torch.long, device="meta")
    return torch.randn(shape, device="meta")


def _note_entry(seen: Watched, path: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        first = next(tensors, None)
        seen.entered.append((path, () if first is None else tuple(first.shape)))

    return hook


def _note_grid(seen: Watched) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not seen.entered and output.ndim == 4:
            seen.grid = (output.shape[-2], output.shape[-1])

    return hook


def _note_norm(seen: Watched) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.normed = tuple(output.shape)

    return hook
