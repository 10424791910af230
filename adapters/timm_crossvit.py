"""Adapter of timm's CrossViT: two branches of other lengths meet in their class tokens."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/crossvit",
    home="timm.models.crossvit",
    classes=("CrossVit",),
    block="timm.models.vision_transformer.Block",
    prefix=1,
    norm=None,
    mode="bypass",
)
