"""Adapter of transformers' CLIP, whose last norm sees the class token only."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/clip",
    home="transformers.models.clip.modeling_clip",
    block="CLIPEncoderLayer",
    prefix=1,
    norm=None,
)
