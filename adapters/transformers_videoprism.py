"""Adapter of transformers' VideoPrism: tokens of a frame meet those of other frames later."""

from tokenprune.adapters._corrected import Corrected

__all__ = ["ADAPTER"]

ADAPTER = Corrected(
    name="transformers/videoprism",
    home="transformers.models.videoprism.modeling_videoprism",
    facts=lambda host, found: {"mode": "bypass"},
)
