"""Adapter of transformers' DINOv3."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/dinov3_vit",
    home="transformers.models.dinov3_vit.modeling_dinov3_vit",
    block="DINOv3ViTLayer",
    prefix=lambda config: 1 + config.num_register_tokens,
    norm="norm",
)
