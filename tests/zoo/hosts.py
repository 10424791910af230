"""The zoo: one tiny host, without trained weights, for every family and variant that is supported.

A row is data: how to build the host, what it takes, and the facts its adapter must find. Behaviours
are tests over all rows, in this folder; a new family is one adapter and one row here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.layers import HybridEmbed
from timm.models import vision_transformer as vit
from timm.models.beit import Beit
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from tests.zoo.images import ODD_IMAGES
from tests.zoo.rows import APART, BYPASS, CLASSES, THREE, Row
from tests.zoo.sequences import SEQUENCES
from tokenprune.models.lvvit import LVViT

__all__ = ["HF", "TEXT", "ZOO", "plain_vit", "registry"]

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
HF |= {"num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 48}
TEXT |= {"eos_token_id": 49}


def registry(model: str, **options: Any) -> nn.Module:
    """A model of timm's registry, made small."""
    return timm.create_model(model, num_classes=CLASSES, **{**TIMM, **options})


def plain_vit(**options: Any) -> nn.Module:
    """timm's ViT with options that no model of the registry has, or not on their own."""
    return vit.VisionTransformer(num_classes=CLASSES, **{**TIMM, **options})


def hybrid() -> nn.Module:
    """A ViT on a stem of convolutions, as MobileCLIP has it."""
    stem = ConvStem(channels=(8, 16, 32), kernel_size=(2, 2, 2), stride=(2, 2, 2), padding=0)
    return plain_vit(patch_size=1, embed_layer=partial(HybridEmbed, backbone=stem, proj=False))


def windowed(model: str, **options: Any) -> nn.Module:
    """A Swin of timm's registry, made small: one block on 256 tokens, two on 64."""
    small = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    small |= {"depths": (1, 2), "num_heads": (2, 4)}
    return timm.create_model(model, num_classes=CLASSES, **{**small, **options})


def hf(model: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A model of transformers, made small."""
    cls = getattr(transformers, model)
    config = cls.config_class(**{**HF, "num_labels": CLASSES, **options})
    config._attn_implementation = attention
    return cls(config)


def hf_towers(model: str, **options: Any) -> nn.Module:
    """A model of transformers whose configuration holds one for images and one for texts."""
    cls = getattr(transformers, model)
    config = cls.config_class(text_config=TEXT, vision_config={**HF, **options}, num_labels=CLASSES)
    config._attn_implementation = "sdpa"
    return cls(config)


def hf_dinov3() -> nn.Module:
    """DINOv3 with a head, as users add one: transformers has no classifier of its own for it."""
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTPreTrainedModel

    class DINOv3Classifier(DINOv3ViTPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.dinov3 = transformers.DINOv3ViTModel(config)
            self.classifier = nn.Linear(config.hidden_size, CLASSES)
            self.post_init()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.classifier(self.dinov3(pixel_values).pooler_output)

    return DINOv3Classifier(transformers.DINOv3ViTConfig(**HF, num_register_tokens=4))


def hf_windowed(model: str) -> nn.Module:
    """A Swin of transformers, made small."""
    small = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    small |= {"depths": [1, 2], "num_heads": [2, 4], "num_labels": CLASSES}
    cls = getattr(transformers, model)
    return cls(cls.config_class(**small))


def hf_timm(model: str) -> nn.Module:
    """A timm model inside transformers' wrapper."""
    config = transformers.TimmWrapperConfig(
        architecture=model, num_labels=CLASSES, model_args=dict(TIMM)
    )
    return transformers.TimmWrapperForImageClassification(config)


def torchvision_vit() -> nn.Module:
    """A host that no adapter but the generic one knows."""
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=CLASSES,
    )


def patches(batch: int, size: int, argument: str) -> dict[str, Tensor]:
    """What SigLIP 2 takes: patches of 8 x 8 pixels; the last image has one row of them less."""
    side = size // 8
    generator = torch.Generator().manual_seed(batch)
    drawn = torch.randn(batch, side * side, 3 * 8 * 8, generator=generator)
    mask = torch.ones(batch, side * side, dtype=torch.long)
    shapes = torch.full((batch, 2), side)
    mask[-1, side * (side - 1) :] = 0
    shapes[-1, 0] = side - 1
    return {argument: drawn, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _row(name: str, family: str, prefix: int, make: Callable[..., nn.Module], **rest: Any) -> Row:
    """A row; keywords that are no field of `Row` go to `make`."""
    own = {key: rest.pop(key) for key in list(rest) if key in Row.__dataclass_fields__}
    return Row(name=name, family=family, num_prefix=prefix, make=partial(make, **rest), **own)


def _vit(name: str, prefix: int, model: str | None = None, **rest: Any) -> Row:
    make = partial(registry, model) if model else plain_vit
    return _row(name, "timm/vision_transformer", prefix, make, **rest)


def _timm(name: str, family: str, prefix: int, model: str, **rest: Any) -> Row:
    return _row(name, f"timm/{family}", prefix, partial(registry, model), **rest)


def _swin(name: str, family: str, make: Callable[..., nn.Module], **rest: Any) -> Row:
    return _row(
        name,
        family,
        0,
        make,
        num_blocks=3,
        mode="bypass",
        recipe=BYPASS,
        patch=4,
        one_patch_one_token=False,
        argument="pixel_values" if make is hf_windowed else "x",
        **rest,
    )


def _hf(name: str, prefix: int, model: str, family: str | None = None, **rest: Any) -> Row:
    make = partial(rest.pop("maker", hf), model)
    return _row(
        name, f"transformers/{family or name}", prefix, make, argument="pixel_values", **rest
    )


TWO_SIZES = (32, 48)
NEWER_BLOCKS = range(hasattr(vit, "DiffParallelScalingBlock"))  # none before timm 1.0.23
ROPE = "vit_small_patch16_rope_224"
CORE: dict[str, Any] = {"depth": 4, "num_blocks": 4, "core": True}
HF_CORE: dict[str, Any] = {"num_hidden_layers": 4, "num_blocks": 4, "core": True}

ZOO: tuple[Row, ...] = (
    # timm: vision_transformer
    _vit("deit", 1, "deit_tiny_patch16_224", recipe=THREE, **CORE),
    _vit("deit_dynamic", 1, "deit_tiny_patch16_224", dynamic_img_size=True, sizes=TWO_SIZES),
    _vit("deit_distilled", 2, "deit_tiny_distilled_patch16_224"),
    _vit("deit3", 1, "deit3_small_patch16_224"),
    _vit("registers", 5, reg_tokens=4),
    _vit("nine_prefix", 9, reg_tokens=8),
    _vit("registers_gap", 4, "vit_medium_patch16_reg4_gap_256"),
    _vit("gap", 0, "vit_base_patch16_gap_224"),
    _vit("gap_with_class_token", 1, global_pool="avg"),
    _vit("avgmax", 1, global_pool="avgmax"),
    _vit("max", 1, global_pool="max"),
    _vit("avg_with_prefix", 1, global_pool="avg", pool_include_prefix=True),
    _vit("siglip_map", 0, "vit_base_patch16_siglip_224"),
    _vit("prr", 1, global_pool="prr"),
    _vit("clip", 1, "vit_base_patch32_clip_224"),
    _vit("clip_quickgelu", 1, "vit_base_patch16_clip_quickgelu_224"),
    _vit("dinov2", 1, "vit_small_patch14_dinov2", dynamic_img_size=True, sizes=TWO_SIZES),
    _vit("dinov2_reg4", 5, "vit_small_patch14_reg4_dinov2"),
    _vit("qk_norm", 1, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    _vit("res_post", 1, block_fn=vit.ResPostBlock, init_values=1e-5),
    _vit("parallel_scaling", 1, block_fn=vit.ParallelScalingBlock),
    _vit("parallel_things", 1, block_fn=vit.ParallelThingsBlock),
    *(_vit("differential", 1, block_fn=vit.DiffParallelScalingBlock) for _ in NEWER_BLOCKS),
    _row("hybrid_stem", "timm/vision_transformer", 1, hybrid),
    # timm: eva
    _timm("eva", "eva", 1, "eva_giant_patch14_224"),
    _timm("eva02", "eva", 1, "eva02_tiny_patch14_224"),
    _timm("eva02_post_norm", "eva", 1, "eva02_tiny_patch14_224", use_post_norm=True),
    _timm("dinov3", "eva", 5, "vit_small_patch16_dinov3", sizes=TWO_SIZES, recipe=APART, **CORE),
    _timm("rope", "eva", 1, ROPE),
    _timm("rope_mixed", "eva", 1, "vit_small_patch16_rope_mixed_224"),
    _timm("rope_ape", "eva", 1, "vit_small_patch16_rope_ape_224"),
    _timm("rope_reg_gap", "eva", 1, "vit_medium_patch16_rope_reg1_gap_256"),
    _timm("rope_grouped_queries", "eva", 1, ROPE, num_kv_heads=1, qkv_fused=False),
    _timm("perception_encoder", "eva", 1, "vit_pe_core_tiny_patch16_384", attn_pool_num_heads=2),
    # timm: beit
    _timm("beit", "beit", 1, "beit_base_patch16_224", recipe=THREE, **CORE),
    _timm("beit_v2", "beit", 1, "beitv2_base_patch16_224"),
    _row(
        "beit_shared_bias",
        "timm/beit",
        1,
        Beit,
        num_classes=CLASSES,
        use_shared_rel_pos_bias=True,
        use_abs_pos_emb=False,
        **TIMM,
    ),
    # timm: vision_transformer_relpos
    _timm("relpos", "vision_transformer_relpos", 0, "vit_relpos_small_patch16_224"),
    _timm("relpos_cls", "vision_transformer_relpos", 1, "vit_relpos_base_patch16_cls_224"),
    _timm("relpos_clsgap", "vision_transformer_relpos", 1, "vit_relpos_base_patch16_clsgap_224"),
    _timm("relpos_shared", "vision_transformer_relpos", 0, "vit_srelpos_small_patch16_224"),
    _timm("relpos_rpn", "vision_transformer_relpos", 0, "vit_relpos_medium_patch16_rpn_224"),
    # timm: windows
    _swin(
        "swin", "timm/swin_transformer", windowed, model="swin_tiny_patch4_window7_224", core=True
    ),
    _swin("swin_v2", "timm/swin_transformer_v2", windowed, model="swinv2_tiny_window8_256"),
    _swin("swin_v2_cr", "timm/swin_transformer_v2_cr", windowed, model="swinv2_cr_tiny_224"),
    # tokenprune
    _row(
        "lvvit",
        "tokenprune/lvvit",
        1,
        LVViT,
        num_classes=CLASSES,
        stem_width=8,
        **TIMM,
        one_patch_one_token=False,
    ),
    # transformers
    _hf("vit", 1, "ViTForImageClassification", recipe=THREE, **HF_CORE),
    _hf(
        "vit_eager", 1, "ViTForImageClassification", "vit", attention="eager", exact_in_double=False
    ),
    _hf("deit_hf", 2, "DeiTForImageClassification", "deit"),
    _hf("deit_teacher", 2, "DeiTForImageClassificationWithTeacher", "deit"),
    _hf("beit_hf", 1, "BeitForImageClassification", "beit", use_relative_position_bias=True),
    _hf(
        "beit_hf_shared",
        1,
        "BeitForImageClassification",
        "beit",
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
    ),
    _hf(
        "data2vec_vision",
        1,
        "Data2VecVisionForImageClassification",
        use_relative_position_bias=True,
    ),
    _hf("dinov2_hf", 1, "Dinov2ForImageClassification", "dinov2", sizes=TWO_SIZES),
    _hf("dinov2_with_registers", 5, "Dinov2WithRegistersForImageClassification"),
    _row(
        "dinov3_vit",
        "transformers/dinov3_vit",
        5,
        hf_dinov3,
        argument="pixel_values",
        sizes=TWO_SIZES,
    ),
    _hf("dinov3_tower", 1, "DINOv3ViTModel", "dinov3_vit", refused="last_hidden_state"),
    _hf("clip_hf", 1, "CLIPForImageClassification", "clip", maker=hf_towers),
    _hf("clip_tower", 1, "CLIPVisionModelWithProjection", "clip", refused="last_hidden_state"),
    _hf("siglip", 0, "SiglipForImageClassification", maker=hf_towers),
    _hf("siglip_tower", 0, "SiglipVisionModel", "siglip", refused="last_hidden_state"),
    _hf(
        "siglip2",
        0,
        "Siglip2ForImageClassification",
        maker=hf_towers,
        num_patches=16,
        draw=patches,
        one_patch_one_token=False,
        exact_in_double=False,
        recipe=APART,
        **HF_CORE,
    ),
    _hf("vit_msn", 1, "ViTMSNForImageClassification"),
    _hf("ijepa", 0, "IJepaForImageClassification"),
    _hf("timm_wrapper", 1, "vit_tiny_patch16_224", maker=hf_timm),
    _swin("swin_hf", "transformers/swin", hf_windowed, model="SwinForImageClassification"),
    _swin("swinv2_hf", "transformers/swinv2", hf_windowed, model="Swinv2ForImageClassification"),
    _swin("donut", "transformers/donut_swin", hf_windowed, model="DonutSwinForImageClassification"),
    _hf("metaclip_2", 1, "MetaClip2ForImageClassification", maker=hf_towers),
    *ODD_IMAGES,
    *SEQUENCES,
    # anything else
    _row("torchvision_vit", "generic", 1, torchvision_vit, argument="x"),
)
