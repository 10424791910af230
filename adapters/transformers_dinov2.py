"""Adapter of transformers' DINOv2."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/dinov2",
    home="transformers.models.dinov2.modeling_dinov2",
    block="Dinov2Layer",
    prefix=1,
)
