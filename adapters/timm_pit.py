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

    def _blocks(self, host: nn.Module) -> tuple[str, ...]:
        number = len(list(host.get_submodule("transformers").children())) - 1
        last = f"transformers.{number}."
        return tuple(path for path in super()._blocks(host) if path.startswith(last))


ADAPTER = Pit(
    name="timm/pit",
    home="timm.models.pit",
    classes=("PoolingVisionTransformer",),
    block="timm.models.vision_transformer.Block",
    norm=None,
)
