"""Adapter of transformers' Swin V2: windows need the whole grid."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/swinv2",
    home="transformers.models.swinv2.modeling_swinv2",
    block="Swinv2Layer",
    prefix=0,
    mode="bypass",
)
