"""Adapter of timm's BEiT and BEiTv2."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/beit",
    home="timm.models.beit",
    classes=("Beit",),
)
