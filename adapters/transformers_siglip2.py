"""Adapter of transformers' SigLIP 2, which takes patches, a padding mask and a grid size."""

from typing import Any

from torch import nn

from tokenprune.adapters._transformers import TransformersFamily, text_inputs
from tokenprune.hosts.spec import ExampleInput

__all__ = ["ADAPTERS"]


def patch_inputs(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Patches [N, channels * side^2], all of them real, of an image whose grid is 1 x 1.

    The grid only says how position embeddings are resized: any grid of at most N patches is valid,
    and an `ExampleInput` can only hold ones.
    """
    side, count = config.patch_size, config.num_patches
    image = {
        "pixel_values": ExampleInput((count, config.num_channels * side * side)),
        "pixel_attention_mask": ExampleInput((count,), ones=True),
        "spatial_shapes": ExampleInput((2,), ones=True),
    }
    return {**text_inputs(host), **image}


ADAPTERS = (
    TransformersFamily(
        name="transformers/siglip2",
        home="transformers.models.siglip2.modeling_siglip2",
        block="Siglip2EncoderLayer",
        prefix=0,
        norm="post_layernorm",
        padding_mask="pixel_attention_mask",
        inputs=patch_inputs,
    ),
)
