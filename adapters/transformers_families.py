"""Families of transformers whose adapter needs no class of its own: one row each."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tokenprune.adapters._corrected import Corrected
from tokenprune.adapters._transformers import TransformersFamily
from tokenprune.hosts.registry import Adapter
from tokenprune.hosts.spec import ExampleInput

__all__ = ["ADAPTERS"]


def _names(family: str, folder: str = "") -> dict[str, Any]:
    home = f"transformers.models.{folder or family}.modeling_{family}"
    return {"name": f"transformers/{family}", "home": home}


def _row(family: str, block: str, prefix: Any, *, folder: str = "", **fields: Any) -> Adapter:
    """The family of `modeling_{family}`; `fields` are those of `TransformersFamily`."""
    return TransformersFamily(**_names(family, folder), block=block, prefix=prefix, **fields)


def _corrected(family: str, facts: Callable[[Any], dict[str, Any]]) -> Adapter:
    """What the generic adapter finds, with `facts` made from the host in place of its own."""
    return Corrected(**_names(family), facts=facts)


def _with_registers(config: Any) -> int:
    return 1 + int(config.num_register_tokens)


def _any_size(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Images of the size of the published weights: the configuration names none."""
    return {"pixel_values": ExampleInput((config.num_channels, 224, 224))}


def _pixels(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Indices of color clusters; the last entry of the vocabulary is the start token."""
    return {"input_ids": ExampleInput((config.n_positions,), high=config.vocab_size - 1)}


def _space_and_time(host: Any) -> dict[str, Any]:
    joint = host.config.attention_type == "joint_space_time"
    return {"mode": "remove" if joint else "bypass", "num_prefix_tokens": 1}


ADAPTERS = (
    _row("beit", "BeitLayer", 1),
    # The last norm sees the class token only.
    _row("clip", "CLIPEncoderLayer", 1, norm=None),
    # CvT: queries and keys are convolutions over the grid. The class token joins in the last stage;
    # before it, the first patch is always kept instead.
    _row(
        "cvt",
        "CvtLayer",
        lambda config: int(any(config.cls_token)),
        norm=None,
        mode="bypass",
        inputs=_any_size,
        marks="patch_sizes",
    ),
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
    # Tokens are pixels, and form the image again at the end.
    _row(
        "imagegpt", "ImageGPTBlock", 0, norm="ln_f", mode="bypass", inputs=_pixels, marks="n_embd"
    ),
    # An attention and a feed-forward part are a block each.
    _row("levit", "LevitResidualLayer", 0, norm=None, mode="bypass"),
    # The last norm sees the class token only.
    _row("metaclip_2", "MetaClip2EncoderLayer", 1, norm=None),
    # Widens the tokens to the frames of its sound after the blocks.
    _corrected("sew", lambda host: {"mode": "bypass"}),
    # SigLIP has patch tokens only.
    _row("siglip", "SiglipEncoderLayer", 0, norm="post_layernorm"),
    # Swin: windows need the whole grid.
    _row("swin", "SwinLayer", 0, mode="bypass"),
    _row("swinv2", "Swinv2Layer", 0, mode="bypass"),
    # Attention along time needs the grid of each frame, unless space and time are one sequence.
    _corrected("timesformer", _space_and_time),
    # The tokens of a frame meet those of other frames later.
    _corrected("videoprism", lambda host: {"mode": "bypass"}),
    _row("vit", "ViTLayer", 1),
    _row("vit_msn", "ViTMSNLayer", 1),
)
