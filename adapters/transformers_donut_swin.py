"""Adapter of transformers' Swin for Donut, which has no final norm."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/donut_swin",
    home="transformers.models.donut.modeling_donut_swin",
    block="DonutSwinLayer",
    prefix=0,
    norm=None,
    mode="bypass",
)
