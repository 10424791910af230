"""Adapter of timm's ViT, the class of DeiT, DINOv2, CLIP, SigLIP, registers and hybrids too."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/vision_transformer",
    home="timm.models.vision_transformer",
    classes=("VisionTransformer",),
)
