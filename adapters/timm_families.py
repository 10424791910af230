"""timm's families whose adapter needs no code of its own: one row each; tokenprune's own LV-ViT."""

from typing import Any

from tokenprune.adapters._timm import TimmFamily

__all__ = ["ADAPTERS"]

VIT_BLOCK = "timm.models.vision_transformer.Block"


def _row(module: str, *classes: str, **fields: Any) -> TimmFamily:
    """The family of `timm.models.{module}`: names of host classes, and fields of `TimmFamily`."""
    home = f"timm.models.{module}"
    return TimmFamily(name=f"timm/{module}", home=home, classes=classes, **fields)


ADAPTERS = (
    # BEiT and BEiTv2.
    _row("beit", "Beit"),
    # Two branches of different lengths, joined through their class tokens.
    _row("crossvit", "CrossVit", block=VIT_BLOCK, prefix=1, norm=None, mode="bypass"),
    # The patches form a grid again after the blocks.
    _row(
        "deepseek_vit",
        "DeepseekVitEncoder",
        "DeepseekVitClassifier",
        block="DeepseekVitBlock",
        norm=None,
        mode="bypass",
    ),
    # EVA-02, DINOv3, RoPE-ViT and the perception encoders too.
    _row("eva", "Eva"),
    # Tokens are removed in the last stage, after which they are averaged. Convolutional variants
    # keep a grid in every stage; the generic adapter describes them.
    _row("levit", "Levit", unless="use_conv", block="LevitBlock", last_of="stages", norm=None),
    # Tokens are removed in the last stage, after which the class token is read.
    _row(
        "pit",
        "PoolingVisionTransformer",
        block=VIT_BLOCK,
        last_of="transformers",
        prefix="num_tokens",
        norm=None,
    ),
    # The patches are merged two by two after the blocks.
    _row(
        "qwen3_vit",
        "Qwen3VitEncoder",
        "Qwen3VitClassifier",
        block="timm.models.eva.EvaBlock",
        norm=None,
        mode="bypass",
    ),
    # Swin: windows need the whole grid, dropped tokens bypass the MLP.
    _row("swin_transformer", "SwinTransformer", block="SwinTransformerBlock", mode="bypass"),
    _row("swin_transformer_v2", "SwinTransformerV2", block="SwinTransformerV2Block", mode="bypass"),
    _row(
        "swin_transformer_v2_cr",
        "SwinTransformerV2Cr",
        block="SwinTransformerV2CrBlock",
        mode="bypass",
    ),
    # Each patch is also a grid of pixel tokens, so none can be removed.
    _row("tnt", "TNT", token_argument=1, mode="bypass"),
    # DeiT, DINOv2, CLIP, SigLIP, registers and hybrids too.
    _row("vision_transformer", "VisionTransformer"),
    # ViT with relative positions.
    _row("vision_transformer_relpos", "VisionTransformerRelPos"),
    # Its outlook blocks see the grid; the class token joins after them.
    _row("volo", "VOLO", block="Transformer", prefix=0, norm=None, mode="bypass"),
    # Convolutions over patches need the grid; the class token joins last.
    _row("xcit", "Xcit", block="XCABlock", prefix=0, norm=None, mode="bypass"),
    TimmFamily(name="tokenprune/lvvit", home="tokenprune.models.lvvit", classes=("LVViT",)),
)
