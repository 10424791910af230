"""Tiny hosts of the families whose tokens stand on a grid, and of those that the generic adapter
describes. They are wrapped with the recipe that `wrap` makes by itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import transformers
from timm.models.focalnet import FocalNet
from timm.models.gcvit import GlobalContextVit
from timm.models.metaformer import MetaFormer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.nextvit import NextViT
from timm.models.volo import VOLO
from torch import nn

from tests.zoo.rows import CLASSES, Row

__all__ = ["GRID"]

FOUR: dict[str, Any] = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}
DIMS = (8, 16, 16, 16)
COLUMN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def registry(model: str, size: int, **options: Any) -> nn.Module:
    """A model of timm's registry, made small, that says which images it takes."""
    told = {"input_size": (3, size, size)}
    return timm.create_model(model, num_classes=CLASSES, pretrained_cfg_overlay=told, **options)


def direct(kind: Callable[..., nn.Module], size: int, **options: Any) -> nn.Module:
    """A model whose registry entry fixes the options that make it large."""
    host = kind(num_classes=CLASSES, **options)
    host.default_cfg = {"input_size": (3, size, size)}
    return host


def swiftformer(size: int) -> nn.Module:
    """SwiftFormer of transformers: additive attention, one block of it a stage."""
    config = transformers.SwiftFormerConfig(
        num_labels=CLASSES, image_size=size, depths=[1, 1, 2, 1], embed_dims=[8, 16, 16, 32]
    )
    return transformers.SwiftFormerForImageClassification(config)


def mvitv2(size: int) -> nn.Module:
    """Multi-scale ViT: it pools its queries inside of blocks."""
    depths, dims = (1, 1, 2, 1), (8, 16, 16, 32)
    cfg = MultiScaleVitCfg(depths=depths, embed_dim=dims, num_heads=(1, 2, 2, 4))
    host = MultiScaleVit(cfg, img_size=(size, size), num_classes=CLASSES)
    host.default_cfg = {"input_size": (3, size, size)}
    return host


def _row(name: str, blocks: int, make: Callable[..., nn.Module], size: int, **rest: Any) -> Row:
    """A row; keywords that are no field of `Row` go to `make`."""
    own = {key: rest.pop(key) for key in list(rest) if key in Row.__dataclass_fields__}
    own = {"family": "generic", "mode": "bypass", "num_prefix": 0, **own}
    made = partial(make, size=size, **rest)
    return Row(name=name, num_blocks=blocks, sizes=(size,), make=made, **own)


def _timm(name: str, blocks: int, model: str, size: int, **rest: Any) -> Row:
    return _row(name, blocks, partial(registry, model), size, **rest)


GRID: tuple[Row, ...] = (
    # tokens leave
    _timm(
        "vitamin", 3, "vitamin_small_224", 64, img_size=64, depth=3,
        family="timm/vision_transformer", mode="remove",
    ),
    _timm(
        "vit_hybrid", 3, "vit_tiny_r_s16_p8_224", 64, img_size=64, embed_dim=32, depth=3,
        num_heads=2, num_prefix=1, family="timm/vision_transformer", mode="remove",
    ),
    _timm(
        "naflexvit", 3, "naflexvit_base_patch16_gap", 64, img_size=64, embed_dim=32, depth=3,
        num_heads=2, num_prefix=4, mode="remove",
    ),
    _timm(
        "gemma4_vit", 3, "gemma4_vit_167m", 96, img_size=96, embed_dim=32, depth=3, num_heads=2,
        mode="remove",
    ),
    _timm("cait", 3, "cait_xxs24_224", 32, **COLUMN, mode="remove"),
    _timm(
        "levit", 3, "levit_128s", 224, embed_dim=(16, 32, 48), num_heads=(2, 2, 3),
        depth=(1, 2, 3), family="timm/levit", mode="remove",
    ),
    _timm(
        "pit", 3, "pit_ti_224", 32, img_size=32, patch_size=8, stride=4, base_dims=[8, 8, 8],
        depth=[1, 1, 3], heads=[2, 2, 4], num_prefix=1, family="timm/pit", mode="remove",
    ),
    # a sequence that has to stay whole
    _timm(
        "deepseek_vit", 3, "deepseek_vit_412m", 84, img_size=84, embed_dim=32, depth=3,
        num_heads=2, family="timm/deepseek_vit",
    ),
    _timm(
        "qwen3_vit", 3, "qwen3_vit_88m", 64, img_size=64, embed_dim=32, depth=3, num_heads=2,
        family="timm/qwen3_vit",
    ),
    _timm(
        "xcit", 3, "xcit_nano_12_p8_224", 32, img_size=32, embed_dim=32, depth=3, num_heads=2,
        family="timm/xcit",
    ),
    _timm("convit", 3, "convit_tiny", 32, **COLUMN, local_up_to_layer=2),
    _timm(
        "crossvit", 4, "crossvit_tiny_240", 240, embed_dim=(16, 32), num_heads=(2, 2),
        depth=((1, 3, 0),), num_prefix=1, family="timm/crossvit",
    ),
    _timm(
        "tnt", 3, "tnt_s_patch16_224", 32, img_size=32, patch_size=8, embed_dim=32, inner_dim=8,
        depth=3, num_heads_inner=2, num_heads_outer=2, num_prefix=1, family="timm/tnt",
    ),
    _timm(
        "levit_conv", 5, "levit_conv_128s", 224, embed_dim=(16, 32, 48), num_heads=(2, 2, 3),
        depth=(1, 3, 1),
    ),
    # grids
    _row(
        "volo", 4, partial(direct, VOLO), 64, img_size=64, layers=(1, 2, 1, 1),
        embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2), stem_hidden_dim=8, family="timm/volo",
    ),
    _timm(
        "visformer", 4, "visformer_tiny", 64, img_size=64, embed_dim=32, depth=(1, 3, 1),
        num_heads=2, init_channels=8, core=True,
    ),
    _timm(
        "samvit", 3, "samvit_base_patch16_224", 32, img_size=32, patch_size=4, embed_dim=16,
        depth=3, num_heads=2, window_size=4, global_attn_indexes=(2,), neck_chans=16,
    ),
    _timm(
        "hieradet_sam2", 5, "hieradet_small", 64, embed_dim=8, num_heads=1, stages=(1, 1, 2, 1),
        global_att_blocks=(3,), global_pos_size=(4, 4),
    ),
    _timm(
        "hiera", 5, "hiera_tiny_224", 64, img_size=(64, 64), embed_dim=8, num_heads=1,
        stages=(1, 1, 2, 1),
    ),
    _timm(
        "twins", 5, "twins_svt_small", 64, img_size=64, embed_dims=DIMS, wss=(4, 4, 4, 2), **FOUR
    ),
    _timm("pvt_v2", 5, "pvt_v2_b0", 64, embed_dims=DIMS, **FOUR),
    _row("mvitv2", 5, mvitv2, 64),
    _timm("davit", 10, "davit_tiny", 64, embed_dims=DIMS, window_size=4, **FOUR),
    _row("gcvit", 5, partial(direct, GlobalContextVit), 64, img_size=64, embed_dim=8, **FOUR),
    _row(
        "nest", 4, partial(direct, Nest), 32, img_size=32, patch_size=2, embed_dims=(8, 16, 16),
        num_heads=(1, 2, 2), depths=(1, 1, 2),
    ),
    _timm(
        "coat", 5, "coat_lite_tiny", 64, img_size=64, embed_dims=(16, 16, 16, 16),
        serial_depths=(1, 2, 1, 1), num_prefix=1,
    ),
    _timm(
        "coatnet", 3, "coatnet_nano_rw_224", 64, img_size=64, embed_dim=(32, 32, 32, 32),
        depths=(1, 1, 2, 1), stem_width=(8, 8),
    ),
    _timm(
        "maxvit", 5, "maxvit_nano_rw_256", 64, img_size=64, embed_dim=(32, 32, 32, 32),
        depths=(1, 1, 2, 1), stem_width=(8, 8),
    ),
    _timm("mobilevit", 9, "mobilevit_xxs", 64, img_size=64),
    _timm(
        "edgenext", 3, "edgenext_xx_small", 64, depths=(1, 1, 2, 1), dims=DIMS, heads=(2, 2, 2, 2)
    ),
    _timm(
        "efficientformer", 6, "efficientformer_l1", 224, depths=(1, 1, 1, 3),
        embed_dims=(8, 8, 16, 16), num_vit=2,
    ),
    _timm(
        "efficientformer_v2", 4, "efficientformerv2_s0", 64, img_size=64, depths=(1, 1, 3, 2),
        embed_dims=(8, 8, 16, 16), num_vit=2,
    ),
    _timm(
        "tiny_vit", 4, "tiny_vit_5m_224", 64, embed_dims=(8, 16, 16, 32),
        window_sizes=(4, 4, 4, 2), **FOUR,
    ),
    _row(
        "nextvit", 8, partial(direct, NextViT), 64, in_chans=3, depths=(1, 1, 5, 1),
        stem_chs=(8, 8, 8),
    ),
    _row("focalnet", 5, partial(direct, FocalNet), 64, embed_dim=8, depths=FOUR["depths"]),
    _row(
        "metaformer", 5, partial(direct, MetaFormer), 64, in_chans=3, dims=DIMS,
        depths=FOUR["depths"],
    ),
    _row("swiftformer", 4, swiftformer, 64, argument="pixel_values"),
)  # fmt: skip
