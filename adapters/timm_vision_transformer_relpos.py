"""Adapter of timm's ViT with relative positions."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/vision_transformer_relpos",
    home="timm.models.vision_transformer_relpos",
    classes=("VisionTransformerRelPos",),
)
