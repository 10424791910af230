"""Classes of open_clip, x-transformers, segment-anything, MONAI, kornia and torchvision."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.held_out_parts.host import HeldOut, image, made_of

__all__ = ["hosts"]

TEXT = {"num_tokens": 99, "max_seq_len": 32}
LAYERS = {"dim": 32, "depth": 4, "heads": 2}
# Options of the layers of x-transformers, by which its encoders differ.
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "post-norm": {"pre_norm": False},
    "sandwich norm": {"sandwich_norm": True},
    "RMS norm": {"use_rmsnorm": True},
    "gated feed-forward": {"ff_glu": True},
    "rotary positions": {"rotary_pos_emb": True},
    "ALiBi": {"alibi_pos_bias": True},
    "relative bias": {"rel_pos_bias": True},
    "dynamic position bias": {"dynamic_pos_bias": True},
    "residual attention": {"residual_attn": True},
    "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "one key head": {"attn_one_kv_head": True},
    "memory keys": {"attn_num_mem_kv": 4},
    "gated values": {"attn_gate_values": True},
    "normed queries and keys": {"attn_qk_norm": True},
    "macaron": {"macaron": True},
    "gated residual": {"gate_residual": True},
    "flash": {"attn_flash": True},
    "value residual": {"add_value_residual": True},
    "hyper-connections": {"num_residual_streams": 2},
}


def hosts() -> Iterator[HeldOut]:
    """The rows."""
    yield from _x_transformers()
    yield from _open_clip()
    yield from _monai()
    yield from _others()


def _row(
    library: str, model: str, make: Callable[[], nn.Module], draw: Any, **options: Any
) -> HeldOut:
    return HeldOut(library=library, model=model, make=make, draw=draw, options=options)


def _ids(name: str = "", length: int = 24, high: int = 90) -> Callable[[], Any]:
    def draw() -> Any:
        ids = torch.randint(1, high, (2, length), generator=torch.Generator().manual_seed(0))
        return {name: ids} if name else ids

    return draw


def _x_transformers() -> Iterator[HeldOut]:
    def vision(**options: Any) -> nn.Module:
        library = import_module("x_transformers")
        layers = library.Encoder(**LAYERS, attn_dim_head=16, **options)
        sides = {"image_size": 32, "patch_size": 8, "num_classes": 7}
        host: nn.Module = library.ViTransformerWrapper(**sides, attn_layers=layers)
        return host

    for name, options in ENCODERS.items():
        make = lambda options=options: vision(**options)  # noqa: E731
        yield _row("x-transformers", f"ViTransformerWrapper, {name}", make, image())

    def text(kind: str, **options: Any) -> nn.Module:
        library = import_module("x_transformers")
        layers = getattr(library, kind)(**LAYERS, attn_dim_head=16)
        host: nn.Module = library.TransformerWrapper(**TEXT, attn_layers=layers, **options)
        return host

    for kind in ("Encoder", "Decoder"):
        yield _row(
            "x-transformers", f"TransformerWrapper, {kind}", lambda kind=kind: text(kind), _ids(),
            restore=True,
        )  # fmt: skip
    pooled = {"num_cls_tokens": 1, "use_cls_token": True, "logits_dim": 7}
    yield _row(
        "x-transformers",
        "TransformerWrapper, class token",
        lambda: text("Encoder", **pooled),
        _ids(),
    )


def _open_clip() -> Iterator[HeldOut]:
    usual = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "heads": 2}
    usual |= {"mlp_ratio": 2.0, "output_dim": 16}
    for name, more in {
        "plain": {},
        "layer scale": {"ls_init_value": 0.1},
        "mean pooling": {"pool_type": "avg"},
        "sine positions": {"pos_embed_type": "sin_cos_2d"},
        "attentional pooling": {"attentional_pool": True, "attn_pooler_heads": 2},
        "no class token in front": {"no_ln_pre": True, "final_ln_after_pool": True},
        "patch dropout": {"patch_dropout": 0.5},
    }.items():
        make = made_of("open_clip.transformer", "VisionTransformer", **{**usual, **more})
        yield _row("open_clip", f"VisionTransformer, {name}", make, image())
    text = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 4}
    make = made_of("open_clip.transformer", "TextTransformer", **text, output_dim=16)
    yield _row("open_clip", "TextTransformer", make, _ids(length=16))

    def clip(kind: str) -> nn.Module:
        library = import_module("open_clip.model")
        vision = library.CLIPVisionCfg(
            layers=4, width=32, head_width=16, patch_size=8, image_size=32
        )
        words = library.CLIPTextCfg(context_length=16, vocab_size=99, width=32, heads=2, layers=4)
        host: nn.Module = getattr(library, kind)(16, vision, words)
        return host

    def both() -> dict[str, Any]:
        return {"image": image()(), "text": _ids(length=16)()}

    for kind in ("CLIP", "CustomTextCLIP"):
        yield _row("open_clip", kind, lambda kind=kind: clip(kind), both)


def _monai() -> Iterator[HeldOut]:
    nets = "monai.networks.nets"
    vit = {"in_channels": 3, "img_size": 32, "patch_size": 8, "hidden_size": 32, "mlp_dim": 64}
    vit |= {"num_layers": 4, "num_heads": 2, "spatial_dims": 2}
    head = {"classification": True, "num_classes": 7}
    make = made_of(nets, "ViT", **vit, **head)
    yield _row("monai", "ViT, class", make, image(), restore=True)
    make = made_of(nets, "ViT", **vit)
    yield _row("monai", "ViT, tokens", make, image(), restore=True)
    yield _row(
        "monai", "ViTAutoEnc", made_of(nets, "ViTAutoEnc", **{**vit, "patch_size": 4}),
        image(), restore=True,
    )  # fmt: skip
    unetr = {"in_channels": 3, "out_channels": 2, "img_size": 32, "feature_size": 8}
    unetr |= {"hidden_size": 48, "mlp_dim": 64, "num_heads": 2, "spatial_dims": 2}
    yield _row("monai", "UNETR", made_of(nets, "UNETR", **unetr), image(), restore=True)
    swin = {"in_channels": 3, "out_channels": 2, "feature_size": 12, "spatial_dims": 2}
    make = made_of(nets, "SwinUNETR", **swin, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 2))
    yield _row("monai", "SwinUNETR", make, image(64))
    words = {"num_tokens": 99, "max_seq_len": 32, "attn_layers_dim": 32, "attn_layers_depth": 4}
    make = made_of(nets, "DecoderOnlyTransformer", **words, attn_layers_heads=2)
    yield _row("monai", "DecoderOnlyTransformer", make, _ids(), restore=True)
    block = {"hidden_size": 32, "mlp_dim": 64, "num_heads": 2}

    def blocks() -> nn.Module:
        made = made_of("monai.networks.blocks.transformerblock", "TransformerBlock", **block)
        return nn.Sequential(*[made() for _ in range(4)], nn.AdaptiveAvgPool2d((1, None)))

    yield _row("monai", "TransformerBlock x 4", blocks, lambda: torch.randn(2, 20, 32))


def _others() -> Iterator[HeldOut]:
    sam = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    sam |= {"out_chans": 16, "use_rel_pos": True, "window_size": 4}
    for name, places in (("windows", (1, 3)), ("global", (0, 1, 2, 3))):
        make = made_of(
            "segment_anything.modeling", "ImageEncoderViT", **sam, global_attn_indexes=places
        )
        yield _row("segment-anything", f"ImageEncoderViT, {name}", make, image(64))
    usual = {"image_size": 32, "patch_size": 8, "num_heads": 2}
    vit = {**usual, "in_channels": 3, "embed_dim": 32, "depth": 4}
    make = made_of("kornia.models.vit", "VisionTransformer", **vit)
    yield _row("kornia", "VisionTransformer", make, image(), restore=True)
    tiny = {"img_size": 64, "embed_dims": [8, 16, 32, 32], "depths": [1, 1, 2, 1]}
    tiny |= {"num_heads": [1, 2, 2, 2], "window_sizes": [4, 4, 4, 2], "num_classes": 7}
    make = made_of("kornia.models.tiny_vit", "TinyViT", **tiny)
    yield _row("kornia", "TinyViT", make, image(64))
    vision = {**usual, "num_layers": 4, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 7}
    yield _row(
        "torchvision", "VisionTransformer",
        made_of("torchvision.models", "VisionTransformer", **vision), image(),
    )  # fmt: skip
    swin = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
    swin |= {"window_size": [4, 4], "num_classes": 7}
    make = made_of("torchvision.models", "SwinTransformer", **swin)
    yield _row("torchvision", "SwinTransformer", make, image(64))
    maxvit = {"input_size": (64, 64), "stem_channels": 8, "partition_size": 4, "head_dim": 8}
    maxvit |= {"block_channels": [8, 16], "block_layers": [1, 1], "stochastic_depth_prob": 0.0}
    make = made_of("torchvision.models", "MaxVit", **maxvit, num_classes=7)
    yield _row("torchvision", "MaxVit", make, image(64))
