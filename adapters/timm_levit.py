"""Adapter of timm's LeViT: tokens are removed in the last stage, after which they are averaged.

Its convolutional variants keep a grid in every stage; the generic adapter describes them.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTERS"]


@dataclass(frozen=True, kw_only=True)
class Levit(TimmFamily):
    """Its stages are in `host.stages`, each on a smaller grid."""

    def matches(self, host: nn.Module) -> bool:
        """Whether it is a LeViT whose tokens are a sequence."""
        return super().matches(host) and not cast(Any, host).use_conv


ADAPTERS = (
    Levit(
        name="timm/levit",
        home="timm.models.levit",
        classes=("Levit",),
        block="LevitBlock",
        last_of="stages",
        norm=None,
    ),
)
