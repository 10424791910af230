"""Adapter of timm's XCiT: convolutions over patches need the grid; the class token comes last."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/xcit",
    home="timm.models.xcit",
    classes=("Xcit",),
    block="XCABlock",
    prefix=0,
    norm=None,
    mode="bypass",
)
