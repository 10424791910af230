"""Adapter of transformers' CvT, whose queries and keys are convolutions over the grid of tokens."""

from typing import Any

from torch import nn

from tokenprune.adapters._transformers import TransformersFamily
from tokenprune.hosts.spec import ExampleInput

__all__ = ["ADAPTER"]

SIDE = 224  # any size is taken; that of the published weights


def image_inputs(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Its configuration names no image size."""
    return {"pixel_values": ExampleInput((config.num_channels, SIDE, SIDE))}


# The class token joins in the last stage; in those before it, the first patch always stays instead.
ADAPTER = TransformersFamily(
    name="transformers/cvt",
    home="transformers.models.cvt.modeling_cvt",
    block="CvtLayer",
    prefix=lambda config: int(any(config.cls_token)),
    norm=None,
    mode="bypass",
    inputs=image_inputs,
    marks="patch_sizes",
)
