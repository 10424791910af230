"""Adapter of transformers' ImageGPT: tokens are pixels, and form the image again at the end."""

from typing import Any

from torch import nn

from tokenprune.adapters._transformers import TransformersFamily
from tokenprune.hosts.spec import ExampleInput

__all__ = ["ADAPTERS"]


def pixel_inputs(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Indices of color clusters; the last entry of the vocabulary is the start token."""
    return {"input_ids": ExampleInput((config.n_positions,), high=config.vocab_size - 1)}


ADAPTERS = (
    TransformersFamily(
        name="transformers/imagegpt",
        home="transformers.models.imagegpt.modeling_imagegpt",
        block="ImageGPTBlock",
        prefix=0,
        norm="ln_f",
        inputs=pixel_inputs,
        mode="bypass",
        marks="n_embd",
    ),
)
