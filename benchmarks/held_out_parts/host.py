"""A held-out host: how it is built, and what it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HeldOut", "image", "made_of"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One host.

    Attributes:
        library: Where it comes from.
        model: Its name in the table.
        make: Builds it, small, with random weights.
        draw: An example input, a batch of two.
        options: Of `wrap`.
    """

    library: str
    model: str
    make: Callable[[], nn.Module]
    draw: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """As the rows of the atlas name what defines a model."""
        return self.library


def image(size: int = 32, *, frames: int = 0, channels: int = 3) -> Callable[[], Tensor]:
    """Draws two random images, or clips [2, channels, frames, size, size]."""
    shape = (2, channels, *([frames] if frames else []), size, size)
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(0))


def made_of(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """Builds a class of a library that is imported then."""

    def make() -> nn.Module:
        built: nn.Module = getattr(import_module(module), name)(**options)
        return built

    return make
