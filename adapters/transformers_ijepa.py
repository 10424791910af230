"""Adapter of transformers' I-JEPA, which has patch tokens only."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/ijepa",
    home="transformers.models.ijepa.modeling_ijepa",
    block="IJepaLayer",
    prefix=0,
)
