"""Adapter of transformers' Data2Vec's vision model."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/data2vec_vision",
    home="transformers.models.data2vec.modeling_data2vec_vision",
    block="Data2VecVisionLayer",
    prefix=1,
)
