"""LV-ViT, the vision transformer of "All Tokens Matter" (arXiv 2104.10858), for timm.

A plain (isotropic) ViT with four differences: a stem of four convolutions, residual branches
divided by `skip_lam`, no bias in qkv, and a second head that classifies every patch token. The
output is

    logits = head(class token) + 0.5 * max over patch tokens of aux_head(patch token)

The authors' code computes this sum in eval only. Here training computes it too, so the loss is that
of the eval output. `model(images, return_parts=True)` returns the two parts instead:
class logits [B, num_classes] and token logits [B, N, num_classes], which is what a token-labeling
loss takes.

Shapes: images [B, in_chans, height, width]; tokens [B, 1 + N, embed_dim], the class token first;
N = (height / patch_size) * (width / patch_size).

| model   | embed_dim | depth | heads | stem width | skip_lam | parameters at 224 |
|---------|-----------|-------|-------|------------|----------|-------------------|
| lvvit_t | 240       | 12    | 4     | 64         | 1        | 8.53 M            |
| lvvit_s | 384       | 16    | 6     | 64         | 2        | 26.15 M           |
| lvvit_m | 512       | 20    | 8     | 64         | 2        | 55.83 M           |
| lvvit_l | 768       | 24    | 12    | 128        | 3        | 150.02 M          |

Sources: arXiv 2104.10858 for the model; the authors' release (github.com/zihangJiang/TokenLabeling)
for the sizes above, the eval output and the names of the parameters. Their state dicts load
with `strict=True`; their files, also for another `img_size`, load through timm:
`timm.create_model("lvvit_m", pretrained=True, pretrained_cfg_overlay={"file": path})`.

MixToken, the paper's augmentation that swaps a random box of tokens between two images, is not
offered: a trace would be specialized to the box. Mix the images instead (CutMix).
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.layers import (
    Attention,
    DropPath,
    Mlp,
    register_notrace_function,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, fx, nn

from tokenprune.errors import HostError

__all__ = ["LVViT", "lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]

AUX_WEIGHT = 0.5


@fx.wrap
def check_image_size(images: Tensor, size: tuple[int, int]) -> None:
    """Raise HostError unless the images are of the size of the position embeddings."""
    height, width = images.shape[-2:]
    if (height, width) != size:
        raise HostError(
            f"This LV-ViT takes images of {size[0]}x{size[1]} pixels, got {height}x{width}. "
            f"Resize the images, or build the model with img_size=({height}, {width})."
        )


register_notrace_function(check_image_size)


class ConvStem(nn.Module):
    """Patch embedding by four convolutions: 7x7 stride 2, two of 3x3, then one per patch.

    Source: arXiv 2104.10858; replaces the single convolution of ViT.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, width: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to patch tokens [B, N, embed_dim], row by row."""
        check_image_size(x, self.img_size)
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.act(self.bn3(self.conv3(x)))
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block whose residual branches are divided by `skip_lam`.

    Source: arXiv 2104.10858, where `skip_lam` is called alpha.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        skip_lam: float,
        qkv_bias: bool,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, L, dim] to tokens [B, L, dim]."""
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.skip_lam
        return cast(Tensor, x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam)


class LVViT(nn.Module):
    """LV-ViT with a class head and a dense head (see the module docstring).

    Args:
        img_size: Height and width of the images in pixels, or one number for both.
        patch_size: Side of a patch in pixels; even, because the stem halves the image first.
        in_chans: Channels of the images.
        num_classes: Outputs of each head; 0 for a model that returns the class token.
        embed_dim: D.
        depth: Number of blocks.
        num_heads: H, a divisor of D.
        mlp_ratio: Hidden width of the MLP over D.
        stem_width: Channels inside the convolution stem.
        skip_lam: What the residual branches are divided by.
        qkv_bias: Whether the query, key and value projection has a bias.
        drop_rate: Dropout of the embedded tokens, of the attention projection and of the MLP.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        global_pool: Only "token"; timm notes it with a saved model.

    Raises:
        HostError: Sizes that do not divide, a negative `num_classes`, or another `global_pool`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        stem_width: int = 64,
        skip_lam: float = 2.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if patch_size < 2 or patch_size % 2:
            raise HostError(
                f"patch_size must be an even number from 2 on, got {patch_size}. Use 16."
            )
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise HostError(
                f"img_size must be a multiple of patch_size={patch_size}, got {height}x{width}. "
                "Pass another img_size."
            )
        if embed_dim % num_heads:
            raise HostError(
                f"embed_dim must be a multiple of num_heads={num_heads}, got {embed_dim}. "
                "Pass another one of the two."
            )
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.global_pool = "token"
        self.patch_embed = ConvStem((height, width), patch_size, in_chans, stem_width, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                skip_lam=skip_lam,
                qkv_bias=qkv_bias,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.reset_classifier(num_classes, global_pool)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups the parameters in layers, for a layer-wise rate."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        """The head of the class token; `aux_head` is the head of the patch tokens."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads by fresh ones.

        Raises:
            HostError: `global_pool` is not "token", or `num_classes` is negative.
        """
        if global_pool not in (None, "token"):
            raise HostError(
                f"LV-ViT has no pooling but the class token: global_pool={global_pool!r} was "
                "asked. Leave it out or pass 'token'."
            )
        if num_classes < 0:
            raise HostError(
                f"num_classes must be 0 or more, got {num_classes}. Pass 0 for no head."
            )
        self.num_classes = num_classes
        self.head, self.aux_head = self._new_head(), self._new_head()

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.cls_token
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        init_linear(head)
        return head.train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to normalised tokens [B, 1 + N, embed_dim].

        Raises:
            HostError: The images have another size than `img_size`.
        """
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.norm(x))

    def forward_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + N, embed_dim] to class logits [B, num_classes] and token logits
        [B, N, num_classes]."""
        return self.head(x[:, 0]), self.aux_head(x[:, 1:])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, 1 + N, embed_dim] to logits [B, num_classes].

        With `pre_logits`, or in a model without classes, to the class token [B, embed_dim].
        """
        if pre_logits or self.num_classes == 0:
            return x[:, 0]
        class_logits, token_logits = self.forward_parts(x)
        return class_logits + AUX_WEIGHT * token_logits.amax(dim=1)

    def forward(self, x: Tensor, return_parts: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, in_chans, height, width] to logits [B, num_classes], the same in training.

        With `return_parts`, to class logits [B, num_classes] and token logits [B, N, num_classes].

        Raises:
            HostError: The images have another size than `img_size`.
        """
        x = self.forward_features(x)
        return self.forward_parts(x) if return_parts else self.forward_head(x)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as the ViT family does; leave every other module alone."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LVViT) -> dict[str, Tensor]:
    """The parameters in a checkpoint, its position embeddings [1, 1 + N, D] resized to `model`."""
    for key in ("state_dict", "model"):
        state_dict = state_dict.get(key, state_dict)
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if "pos_embed" in weights:
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=1
        )
    return weights


def _cfg(url: str = "", crop_pct: float = 0.9) -> dict[str, Any]:
    """Size, classes and normalisation are timm's defaults, which are ImageNet's."""
    return {
        "url": url,
        "fixed_input_size": True,
        "crop_pct": crop_pct,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
        "origin_url": "https://github.com/zihangJiang/TokenLabeling",
        "paper_ids": "arXiv:2104.10858",
    }


_RELEASES = "https://github.com/zihangJiang/TokenLabeling/releases/download"
default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.tlt_in1k": _cfg(f"{_RELEASES}/v0.2.0/lvvit_t.pth"),
        "lvvit_s.tlt_in1k": _cfg(f"{_RELEASES}/1.0/lvvit_s-26M-224-83.3.pth.tar"),
        "lvvit_m.tlt_in1k": _cfg(f"{_RELEASES}/1.0/lvvit_m-56M-224-84.0.pth.tar", crop_pct=1.0),
        # Released at 448 and 512 pixels only: load those files with the matching img_size.
        "lvvit_l.untrained": _cfg(crop_pct=1.0),
    }
)


def _build(name: str, pretrained: bool, options: dict[str, Any], **sizes: Any) -> LVViT:
    model = build_model_with_cfg(
        LVViT, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **(sizes | options)
    )
    return cast(LVViT, model)


def lvvit_t(pretrained: bool = False, **options: Any) -> LVViT:
    """LV-ViT-T: 12 blocks of 240 channels; `options` as for `LVViT`."""
    return _build("lvvit_t", pretrained, options, embed_dim=240, depth=12, num_heads=4, skip_lam=1)


def lvvit_s(pretrained: bool = False, **options: Any) -> LVViT:
    """LV-ViT-S: 16 blocks of 384 channels; `options` as for `LVViT`."""
    return _build("lvvit_s", pretrained, options, embed_dim=384, depth=16, num_heads=6, skip_lam=2)


def lvvit_m(pretrained: bool = False, **options: Any) -> LVViT:
    """LV-ViT-M: 20 blocks of 512 channels; `options` as for `LVViT`."""
    return _build("lvvit_m", pretrained, options, embed_dim=512, depth=20, num_heads=8, skip_lam=2)


def lvvit_l(pretrained: bool = False, **options: Any) -> LVViT:
    """LV-ViT-L: 24 blocks of 768 channels; `options` as for `LVViT`."""
    sizes = {"embed_dim": 768, "depth": 24, "num_heads": 12, "stem_width": 128, "skip_lam": 3}
    return _build("lvvit_l", pretrained, options, **sizes)


for _entry in (lvvit_t, lvvit_s, lvvit_m, lvvit_l):
    register_model(_entry)
