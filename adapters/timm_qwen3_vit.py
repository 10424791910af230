"""Adapter of timm's Qwen3 ViT: its patches are merged two by two behind the blocks."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/qwen3_vit",
    home="timm.models.qwen3_vit",
    classes=("Qwen3VitEncoder", "Qwen3VitClassifier"),
    block="timm.models.eva.EvaBlock",
    norm=None,
    mode="bypass",
)
