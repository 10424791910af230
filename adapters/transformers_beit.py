"""Adapter of transformers' BEiT."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/beit",
    home="transformers.models.beit.modeling_beit",
    block="BeitLayer",
    prefix=1,
)
