"""Adapter of this library's LV-ViT."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="tokenprune/lvvit",
    home="tokenprune.models.lvvit",
    classes=("LVViT",),
)
