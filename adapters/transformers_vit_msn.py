"""Adapter of transformers' ViT-MSN."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/vit_msn",
    home="transformers.models.vit_msn.modeling_vit_msn",
    block="ViTMSNLayer",
    prefix=1,
)
