"""Families of transformers whose adapter needs no code of its own: one row each."""

from typing import Any

from tokenprune.adapters._corrected import Corrected
from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTERS"]


def _row(
    family: str, block: str, prefix: Any, *, folder: str = "", **fields: Any
) -> TransformersFamily:
    """The family of `modeling_{family}` in `transformers.models.{folder or family}`.

    Args:
        fields: Of `TransformersFamily`.
    """
    home = f"transformers.models.{folder or family}.modeling_{family}"
    name = f"transformers/{family}"
    return TransformersFamily(name=name, home=home, block=block, prefix=prefix, **fields)


def _bypass(family: str) -> Corrected:
    """What the generic adapter finds, with mode `bypass`."""
    return Corrected(
        name=f"transformers/{family}",
        home=f"transformers.models.{family}.modeling_{family}",
        facts=lambda host: {"mode": "bypass"},
    )


def _with_registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


ADAPTERS = (
    _row("beit", "BeitLayer", 1),
    # The last norm sees the class token only.
    _row("clip", "CLIPEncoderLayer", 1, norm=None),
    _row("data2vec_vision", "Data2VecVisionLayer", 1, folder="data2vec"),
    # All of its models have a distillation token.
    _row("deit", "DeiTLayer", 2),
    _row("dinov2", "Dinov2Layer", 1),
    _row("dinov2_with_registers", "Dinov2WithRegistersLayer", _with_registers),
    _row("dinov3_vit", "DINOv3ViTLayer", _with_registers, norm="norm"),
    # Donut's Swin has no final norm.
    _row("donut_swin", "DonutSwinLayer", 0, folder="donut", norm=None, mode="bypass"),
    # I-JEPA has patch tokens only.
    _row("ijepa", "IJepaLayer", 0),
    # An attention and a feed-forward part are a block each.
    _row("levit", "LevitResidualLayer", 0, norm=None, mode="bypass"),
    # The last norm sees the class token only.
    _row("metaclip_2", "MetaClip2EncoderLayer", 1, norm=None),
    # Widens the tokens to the frames of its sound after the blocks.
    _bypass("sew"),
    # SigLIP has patch tokens only.
    _row("siglip", "SiglipEncoderLayer", 0, norm="post_layernorm"),
    # Swin: windows need the whole grid.
    _row("swin", "SwinLayer", 0, mode="bypass"),
    _row("swinv2", "Swinv2Layer", 0, mode="bypass"),
    # The tokens of a frame meet those of other frames later.
    _bypass("videoprism"),
    _row("vit", "ViTLayer", 1),
    _row("vit_msn", "ViTMSNLayer", 1),
)
