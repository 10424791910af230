"""Adapter of timm's EVA, the class of EVA-02, DINOv3, RoPE-ViT and the perception encoders too."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/eva",
    home="timm.models.eva",
    classes=("Eva",),
)
