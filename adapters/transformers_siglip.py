"""Adapter of transformers' SigLIP, which has patch tokens only."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/siglip",
    home="transformers.models.siglip.modeling_siglip",
    block="SiglipEncoderLayer",
    prefix=0,
    norm="post_layernorm",
)
