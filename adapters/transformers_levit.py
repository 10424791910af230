"""Adapter of transformers' LeViT: an attention and a feed-forward part are a block each."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/levit",
    home="transformers.models.levit.modeling_levit",
    block="LevitResidualLayer",
    prefix=0,
    norm=None,
    mode="bypass",
)
