"""Adapter of transformers' SEW, which widens tokens to the frames of its sound after the blocks."""

from tokenprune.adapters._corrected import Corrected

__all__ = ["ADAPTER"]

ADAPTER = Corrected(
    name="transformers/sew",
    home="transformers.models.sew.modeling_sew",
    facts=lambda host, found: {"mode": "bypass"},
)
