"""Adapter of timm's PiT: tokens leave in the last stage, behind which the class token is read."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]


@dataclass(frozen=True, kw_only=True)
class Pit(TimmFamily):
    """Its stages stand in `host.transformers`, on a smaller grid each."""

    def _prefix(self, host: nn.Module) -> int:
        return int(cast(Any, host).num_tokens)


ADAPTER = Pit(
    name="timm/pit",
    home="timm.models.pit",
    classes=("PoolingVisionTransformer",),
    block="timm.models.vision_transformer.Block",
    last_of="transformers",
    norm=None,
)
