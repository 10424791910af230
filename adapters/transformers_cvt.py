"""Adapter of transformers' CvT, whose queries and keys are convolutions over the grid of tokens."""

from typing import Any

from torch import nn

from tokenprune.adapters._transformers import TransformersFamily
from tokenprune.hosts.spec import ExampleInput

__all__ = ["ADAPTERS"]

SIDE = 224  # any size is taken; that of the published weights


def image_inputs(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Images of `SIDE` pixels: the configuration names no size."""
    return {"pixel_values": ExampleInput((config.num_channels, SIDE, SIDE))}


# The class token joins in the last stage; before it, the first patch is always kept instead.
ADAPTERS = (
    TransformersFamily(
        name="transformers/cvt",
        home="transformers.models.cvt.modeling_cvt",
        block="CvtLayer",
        prefix=lambda config: int(any(config.cls_token)),
        norm=None,
        mode="bypass",
        inputs=image_inputs,
        marks="patch_sizes",
    ),
)
