"""Adapter of timm's DeepSeek ViT: its patches form a grid again behind the blocks."""

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTER"]

ADAPTER = TimmFamily(
    name="timm/deepseek_vit",
    home="timm.models.deepseek_vit",
    classes=("DeepseekVitEncoder", "DeepseekVitClassifier"),
    block="DeepseekVitBlock",
    norm=None,
    mode="bypass",
)
