"""Adapter of timm's TNT: each patch stands for a grid of pixel tokens, so none can leave."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/tnt",
    home="timm.models.tnt",
    classes=("TNT",),
    token_argument=1,
    mode="bypass",
)
