"""Adapter of transformers' MetaCLIP 2, whose last norm sees the class token only."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/metaclip_2",
    home="transformers.models.metaclip_2.modeling_metaclip_2",
    block="MetaClip2EncoderLayer",
    prefix=1,
    norm=None,
)
