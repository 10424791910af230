"""Adapter of transformers' DeiT: its models all have a distillation token."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/deit",
    home="transformers.models.deit.modeling_deit",
    block="DeiTLayer",
    prefix=2,
)
