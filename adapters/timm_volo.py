"""Adapter of timm's VOLO: outlooking blocks see the grid; the class token comes behind them."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/volo",
    home="timm.models.volo",
    classes=("VOLO",),
    block="Transformer",
    prefix=0,
    norm=None,
    mode="bypass",
)
