"""Adapter of transformers' Swin: windows need the whole grid."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/swin",
    home="transformers.models.swin.modeling_swin",
    block="SwinLayer",
    prefix=0,
    mode="bypass",
)
