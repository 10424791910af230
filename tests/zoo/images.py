"""Rows of the zoo whose models of transformers keep a grid, or see images in an odd way."""

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo.rows import BYPASS, CLASSES, TWO, Row

__all__ = ["ODD_IMAGES"]

COLORS = 17


def hf(model: str, **options: Any) -> nn.Module:
    """A classifier of transformers."""
    cls = getattr(transformers, model)
    config = cls.config_class(**{"num_labels": CLASSES, **options})
    config.use_cache = False
    return cls(config)


def mobilevit(model: str, **options: Any) -> nn.Module:
    """A MobileViT with 1, 2 and 1 blocks: its class says 2, 4 and 3, whatever the config."""
    host = hf(model, **options)
    columns = [m for m in host.modules() if type(m).__name__ == "MobileViTTransformer"]
    for column, depth in zip(columns, (1, 2, 1), strict=True):
        del column.layer[depth:]
    return host


def colors(batch: int, length: int, argument: str) -> dict[str, Tensor]:
    """Pixels as numbers of color clusters."""
    generator = torch.Generator().manual_seed(batch)
    return {argument: torch.randint(0, COLORS - 1, (batch, length), generator=generator)}


def _grid(name: str, model: str, tokens: int, blocks: int, family: str = "", **rest: Any) -> Row:
    own = {key: rest.pop(key) for key in list(rest) if key in Row.__dataclass_fields__}
    return Row(
        name=name,
        family=f"transformers/{family}" if family else "generic",
        make=partial(rest.pop("maker", hf), f"{model}ForImageClassification", **rest),
        num_tokens=tokens,
        num_blocks=blocks,
        one_patch_one_token=False,
        argument="pixel_values",
        **{"num_prefix": 0, "mode": "bypass", "recipe": BYPASS, "sizes": (64,), **own},
    )


def _stages(*blocks: int) -> dict[str, Any]:
    schedule = {"blocks": list(blocks), "keep_ratio": 0.6}
    return {"version": 1, "schedule": schedule, "mode": "bypass"}


FOUR: dict[str, Any] = {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
FOUR |= {"num_attention_heads": [1, 2, 3, 4], "final_tokens": 5}
STEPS: dict[str, Any] = {"image_size": 64, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
STEPS |= {"num_attention_heads": [1, 2, 3], "num_encoder_blocks": 3, "final_tokens": 16}

ODD_IMAGES: tuple[Row, ...] = (
    _grid("pvt", "Pvt", 64, 5, **FOUR),  # the class token joins late
    _grid("pvt_v2", "PvtV2", 64, 4, **STEPS),
    _grid("segformer", "Segformer", 64, 4, **STEPS, decoder_hidden_size=16),
    _grid(
        "hiera",
        "Hiera",
        16,
        5,
        recipe=_stages(3, 4),
        image_size=[64, 64],
        embed_dim=8,
        depths=[1, 1, 3],
        num_heads=[1, 2, 4],
        masked_unit_size=[8, 8],
        num_query_pool=2,
    ),
    _grid(
        "levit",
        "Levit",
        16,
        10,
        "levit",
        recipe=_stages(0, 2),
        final_tokens=1,
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[2, 4, 6],
        depths=[2, 1, 1],
        key_dim=[8, 8, 8],
    ),
    _grid(
        "cvt",
        "Cvt",
        196,
        6,
        "cvt",
        sizes=(224,),
        num_prefix=1,
        recipe=_stages(3, 4),
        embed_dim=[8, 16, 24],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
    ),
    _grid(
        "mobilevit",
        "MobileViT",
        16,
        4,
        maker=mobilevit,
        recipe=_stages(1, 2),
        final_tokens=4,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_attention_heads=2,
    ),
    _grid(
        "mobilevitv2",
        "MobileViTV2",
        16,
        4,
        recipe=_stages(1, 2),
        n_attn_blocks=[1, 2, 1],
        final_tokens=4,
        image_size=64,
        width_multiplier=0.5,
    ),
    _grid(
        "focalnet",
        "FocalNet",
        64,
        3,
        sizes=(32,),
        image_size=32,
        embed_dim=16,
        depths=[1, 2],
        hidden_sizes=[16, 32],
        patch_size=2,
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    Row(
        name="imagegpt",
        family="transformers/imagegpt",
        make=partial(
            hf,
            "ImageGPTForImageClassification",
            n_embd=32,
            n_layer=3,
            n_head=2,
            vocab_size=COLORS,
            n_positions=24,
        ),
        num_prefix=0,
        num_blocks=3,
        num_tokens=24,
        sizes=(24,),
        argument="input_ids",
        mode="bypass",
        recipe=BYPASS,
        one_patch_one_token=False,
        draw=colors,
    ),
    Row(
        name="perceiver",
        family="generic",
        make=partial(
            hf,
            "PerceiverForImageClassificationLearned",
            num_latents=16,
            d_latents=32,
            d_model=512,
            num_blocks=1,
            num_self_attends_per_block=3,
            num_self_attention_heads=2,
            num_cross_attention_heads=1,
            image_size=32,
        ),
        num_prefix=0,
        num_blocks=3,
        num_tokens=16,
        argument="inputs",
        recipe=TWO,
        one_patch_one_token=False,
    ),
)
