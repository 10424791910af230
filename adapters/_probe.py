"""Run a copy of a host on fake tensors up to its end, and watch what enters its blocks."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_leaves

from tokenprune.arch import ExampleInput

__all__ = ["Watched", "watch"]

BATCH = 2


@dataclass
class Watched:
    """What one forward showed.

    Attributes:
        entered: Blocks in the order they ran, with the shape of their first tensor, [B, ...].
        grid: Height and width of the last convolution's output before the first block; None if
            there was none.
    """

    entered: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    grid: tuple[int, int] | None = None


def watch(
    host: nn.Module, blocks: Sequence[str], inputs: Mapping[str, ExampleInput]
) -> Watched | str:
    """Run `host` in eval mode without memory or arithmetic; the host itself is not touched.

    Returns:
        What was seen, or in words why the host does not run so.
    """
    seen = Watched()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with fake_mode, FakeCopyMode(fake_mode):
            # a copy, since hosts keep tables they have made: theirs must not become fake ones
            host = copy.deepcopy(host).eval()
        for path, module in host.named_modules():
            if path in blocks:
                module.register_forward_pre_hook(_note_entry(seen, path), with_kwargs=True)
            elif isinstance(module, nn.Conv2d):
                module.register_forward_hook(_note_grid(seen))
        device = next((p.device for p in host.parameters()), torch.device("cpu"))
        with fake_mode, torch.no_grad(), device:
            host(**{name: _draw(example) for name, example in inputs.items()})
    except Exception as error:  # any host: whatever it raises is an answer
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return seen


def _draw(example: ExampleInput) -> torch.Tensor:
    shape = (BATCH, *example.shape)
    if example.ones or example.high is not None:
        return torch.ones(shape, dtype=torch.long)
    return torch.randn(shape)


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
