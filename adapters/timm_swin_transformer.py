"""Adapter of timm's Swin: windows need the whole grid, dropped tokens bypass the MLP."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/swin_transformer",
    home="timm.models.swin_transformer",
    classes=("SwinTransformer",),
    block="SwinTransformerBlock",
    mode="bypass",
)
