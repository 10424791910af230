"""Adapter of transformers' ViT."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/vit",
    home="transformers.models.vit.modeling_vit",
    block="ViTLayer",
    prefix=1,
)
