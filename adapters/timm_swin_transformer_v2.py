"""Adapter of timm's Swin V2: windows need the whole grid, dropped tokens bypass the MLP."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/swin_transformer_v2",
    home="timm.models.swin_transformer_v2",
    classes=("SwinTransformerV2",),
    block="SwinTransformerV2Block",
    mode="bypass",
)
