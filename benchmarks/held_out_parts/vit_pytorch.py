"""Every class of vit-pytorch that takes images, clips or series and gives classes or embeddings."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.held_out_parts.host import HeldOut, image, made_of

__all__ = ["hosts"]

SIZES = {"image_size": 32, "patch_size": 8}
HEAD = {"num_classes": 7}
WIDTHS = {"dim": 32, "depth": 4, "heads": 2, "mlp_dim": 64}
USUAL = {**SIZES, **HEAD, **WIDTHS}
NARROW = {**USUAL, "dim_head": 16}
CLIP = {"image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
SERIES = {"seq_len": 64, "patch_size": 4}

# Modules whose class takes the usual arguments, and what else it needs.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {}),
    "simple_vit": ("SimpleViT", {}),
    "cait": ("CaiT", {"cls_depth": 2}),
    "deepvit": ("DeepViT", {}),
    "jet_vit": ("JetViT", {"window_size": 2, "dim_head": 16}),
    "jumbo_vit": ("JumboViT", {}),
    "learnable_memory_vit": ("ViT", {}),
    "look_vit": ("LookViT", {"mlp_dim": None, "highres_patch_size": 4, "mlp_factor": 2}),
    "normalized_vit": ("nViT", {}),
    "parallel_vit": ("ViT", {}),
    "rvt": ("RvT", {}),
    "simple_flash_attn_vit": ("SimpleViT", {}),
    "simple_uvit": ("SimpleUViT", {}),
    "simple_vit_attn_residual": ("SimpleViTAttnResidual", {}),
    "attn_residual_with_dca_simple_vit": ("SimpleViT", {}),
    "simple_vit_orthog_residual_update": ("SimpleViT", {}),
    "simple_vit_with_fft": ("SimpleViT", {"freq_patch_size": 8}),
    "simple_vit_with_hyper_connections": ("SimpleViT", {"num_residual_streams": 2}),
    "simple_vit_with_patch_dropout": ("SimpleViT", {}),
    "simple_vit_with_qk_norm": ("SimpleViT", {}),
    "simple_vit_with_register_tokens": ("SimpleViT", {}),
    "simple_vit_with_relative_proj_pos_bias": ("SimpleViT", {}),
    "simple_vit_with_sparse_gating": ("SimpleViTWithSparseGating", {}),
    "simple_vit_with_specialized_cls": ("SimpleViT", {}),
    "simple_vit_with_value_residual": ("SimpleViT", {}),
    "vat": ("ViT", {}),
    "vit_5": ("ViT", {}),
    "vit_for_small_dataset": ("ViT", {}),
    "vit_with_decorr": ("ViT", {}),
    "vit_with_keel_post_ln": ("ViT", {}),
    "vit_with_patch_dropout": ("ViT", {}),
    "vit_with_patch_merger": ("ViT", {"patch_merge_layer": 3}),
    "vit_detpool": ("ViTDetPool", {}),
    "ats_vit": ("ViT", {"max_tokens_per_depth": (16, 12, 8, 4)}),
    "xcit": ("XCiT", {"cls_depth": 2}),
    "mp3": ("ViT", {}),
}


def hosts() -> Iterator[HeldOut]:
    """The rows of this library."""
    for module, (name, more) in PLAIN.items():
        options = {k: v for k, v in {**USUAL, **more}.items() if v is not None}
        yield _row(module, name, image(), **options)
    for module in ("vit_nd", "vit_nd_rotary", "vit_nd_pope"):
        sides = {"ndim": 2, "input_shape": (32, 32), "patch_size": 8}
        yield _row(module, "ViTND", image(), **{**sides, **HEAD, **WIDTHS})
    yield _row("vit_1d", "ViT", _series, **{**SERIES, **HEAD, **WIDTHS})
    yield _row("simple_vit_1d", "SimpleViT", _series, **{**SERIES, **HEAD, **WIDTHS})
    for module, name in (
        ("vit_3d", "ViT"),
        ("simple_vit_3d", "SimpleViT"),
        ("simple_flash_attn_vit_3d", "SimpleViT"),
    ):
        yield _row(module, name, image(frames=4), **{**CLIP, **HEAD, **WIDTHS})
    for variant in ("factorized_encoder", "factorized_self_attention"):
        vivit = {"dim": 32, "spatial_depth": 3, "temporal_depth": 3, "heads": 2, "mlp_dim": 64}
        options = {**CLIP, **HEAD, **vivit, "variant": variant}
        yield _row("vivit", "ViViT", image(frames=4), variant, **options)
    vivit = {"dim": 32, "spatial_depth": 3, "temporal_depth": 3, "heads": 2, "mlp_dim": 64}
    yield _row("vivit_with_moss", "ViViT", image(frames=4), **{**CLIP, **HEAD, **vivit})
    yield _row("vat_siglip", "SigLIP", image(), **SIZES, **WIDTHS)
    yield from _grids()
    yield from _others()


def _grids() -> Iterator[HeldOut]:
    """Those that keep a grid, or several."""
    four = {"dim": (16, 16, 32, 32), "depth": (1, 1, 2, 2)}
    yield _row(
        "crossformer",
        "CrossFormer",
        image(64),
        **{**four, "dim": (64, 64, 64, 64)},
        **HEAD,
        global_window_size=(4, 4, 2, 1),
        local_window_size=(4, 4, 2, 1),
    )
    cvt = {
        f"s{s}_{key}": value
        for s, width in enumerate((16, 32, 32), start=1)
        for key, value in {"emb_dim": width, "heads": 1, "depth": 2}.items()
    }
    yield _row("cvt", "CvT", image(64), **HEAD, **cvt)
    levit = {"dim": (16, 32, 32), "depth": 2, "heads": (2, 2, 2), "mlp_mult": 2}
    yield _row("levit", "LeViT", image(64), image_size=64, **HEAD, **levit, dim_key=8, dim_value=16)
    maxvit = {"dim": 16, "dim_conv_stem": 8, "dim_head": 8, "depth": (1, 2), "window_size": 4}
    yield _row("max_vit", "MaxViT", image(64), **HEAD, **maxvit)
    yield _row("max_vit_with_registers", "MaxViT", image(64), **HEAD, **maxvit)
    mobile = {"dims": [32, 32, 32], "channels": [8, 8, 16, 16, 16, 16, 16, 16, 16, 16, 32]}
    yield _row("mobile_vit", "MobileViT", image(64), image_size=(64, 64), **HEAD, **mobile)
    yield _row(
        "nest",
        "NesT",
        image(),
        image_size=32,
        patch_size=4,
        dim=16,
        heads=2,
        num_hierarchies=2,
        block_repeats=(2, 2),
        **HEAD,
    )
    yield _row("pit", "PiT", image(), **{**USUAL, "depth": (2, 2), "patch_size": 4})
    yield _row(
        "regionvit", "RegionViT", image(64), **{**four, "dim": (16, 16, 32, 64)}, **HEAD,
        window_size=2,
    )  # fmt: skip
    yield _row(
        "scalable_vit",
        "ScalableViT",
        image(64),
        **HEAD,
        dim=16,
        heads=(1, 2),
        depth=(2, 2),
        reduction_factor=(4, 2),
        window_size=(4, None),
    )
    yield _row(
        "sep_vit", "SepViT", image(56), **HEAD, dim=16, dim_head=8, heads=(1, 2), depth=(2, 2)
    )  # fmt: skip
    twins = {
        f"s{s}_{key}": value
        for s, width in enumerate((16, 16, 32, 32), start=1)
        for key, value in {
            "emb_dim": width,
            "depth": 1,
            "local_patch_size": 2,
            "global_k": 2,
        }.items()
    }
    twins["s4_local_patch_size"] = 2
    yield _row("twins_svt", "TwinsSVT", image(64), **HEAD, **twins)


def _others() -> Iterator[HeldOut]:
    """Those with arguments of their own."""
    cct = {"img_size": 32, "embedding_dim": 32, "n_conv_layers": 2, "num_layers": 4, "num_heads": 2}
    cct |= {"mlp_ratio": 2.0, "num_classes": 7, "positional_embedding": "learnable"}
    yield _row("cct", "CCT", image(), **cct)
    clip = {**cct, "num_frames": 4, "frame_kernel_size": 3}
    yield _row("cct_3d", "CCT", image(frames=4), **clip)
    cross = {
        f"{s}_{key}": value
        for s, patch in (("sm", 4), ("lg", 8))
        for key, value in {
            "dim": 32, "patch_size": patch, "enc_depth": 2, "enc_heads": 2, "enc_mlp_dim": 64,
        }.items()
    }  # fmt: skip
    yield _row("cross_vit", "CrossViT", image(), image_size=32, **HEAD, **cross, depth=2)
    yield _row(
        "t2t", "T2TViT", image(), image_size=32, **HEAD, **WIDTHS, t2t_layers=((3, 2), (3, 2))
    )
    looped = {"pre_loop_depth": 2, "num_looped_blocks": 1, "post_loop_depth": 2, "loop_depth": 2}
    yield _row(
        "looped_vit", "LoopedViT", image(), **SIZES, **HEAD, dim=32, heads=2, mlp_dim=64, **looped
    )

    def efficient() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        inner = nn.TransformerEncoder(layer, 4)
        return made_of("vit_pytorch.efficient", "ViT", **SIZES, **HEAD, dim=32, transformer=inner)()

    yield HeldOut(library="vit-pytorch", model="efficient.ViT", make=efficient, draw=image())
    yield _row("wwt", "WWT", image(), **{**USUAL, "num_slots": 4})
    for module, argument in (("na_vit", "batched_images"), ("na_vit_nested_tensor", "images")):
        yield _row(module, "NaViT", partial(_ragged, argument), **USUAL)


def _row(module: str, name: str, draw: Any, of: str = "", /, **options: Any) -> HeldOut:
    model = f"{module}.{name}" + (f" ({of})" if of else "")
    make = made_of(f"vit_pytorch.{module}", name, **options)
    return HeldOut(library="vit-pytorch", model=model, make=make, draw=draw)


def _series() -> torch.Tensor:
    return torch.randn(2, 3, 64)


def _ragged(argument: str) -> dict[str, Any]:
    return {argument: [torch.randn(3, 32, 32), torch.randn(3, 16, 32)]}
