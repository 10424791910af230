"""Adapter of timm's LeViT: tokens leave in the last stage, behind which they are only averaged.

Its convolutional variants keep a grid all the way; the generic adapter describes them.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]


@dataclass(frozen=True, kw_only=True)
class Levit(TimmFamily):
    """Its stages stand in `host.stages`, on a smaller grid each."""

    def matches(self, host: nn.Module) -> bool:
        """Whether it is a LeViT whose tokens are a sequence."""
        return super().matches(host) and not cast(Any, host).use_conv


ADAPTER = Levit(
    name="timm/levit",
    home="timm.models.levit",
    classes=("Levit",),
    block="LevitBlock",
    last_of="stages",
    norm=None,
)
