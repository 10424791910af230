"""Adapter of timm's Swin V2 (CR): windows need the whole grid, dropped tokens bypass the MLP."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/swin_transformer_v2_cr",
    home="timm.models.swin_transformer_v2_cr",
    classes=("SwinTransformerV2Cr",),
    block="SwinTransformerV2CrBlock",
    mode="bypass",
)
