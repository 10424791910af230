"""The hosts of the speed benchmark, with random weights: speed does not depend on them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn

import tokenprune.models  # noqa: F401  registers lvvit_* with timm
from tokenprune.recipe import RecipeSource

__all__ = ["HOSTS", "SpeedHost"]


@dataclass(frozen=True)
class SpeedHost:
    """A host and the recipe that prunes it, all at base keep ratio 0.7.

    Attributes:
        name: in the tables.
        build: makes the host.
        recipe: for `wrap`.
        size: side of the images in pixels.
        plain: dropped tokens are removed; otherwise they skip the MLPs.
        batches: sizes to measure.
    """

    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    recipe: RecipeSource = field(repr=False)
    size: int = 224
    plain: bool = True
    batches: tuple[int, ...] = (1, 8, 32, 64)


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        host: nn.Module = timm.create_model(name)
        return host

    return build


def _transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000))


def _quarters(depth: int) -> dict[str, Any]:
    blocks = [depth // 4, depth // 2, 3 * depth // 4]
    return {"version": 1, "schedule": {"blocks": blocks, "keep_ratio": 0.7}}


LARGE = (1, 8, 32)  # batches of hosts for which one of 64 takes half a minute
HOSTS: tuple[SpeedHost, ...] = (
    SpeedHost("DeiT-S", _timm("deit_small_patch16_224"), "dynamicvit-deit-small-k0.7"),
    SpeedHost("LV-ViT-S", _timm("lvvit_s"), "dynamicvit-lvvit-s-k0.7"),
    SpeedHost(
        "Swin-T",
        _timm("swin_tiny_patch4_window7_224"),
        "dynamicvit-swin-tiny-k0.7",
        plain=False,
    ),
    SpeedHost("EVA-02-S", _timm("eva02_small_patch14_224"), _quarters(12)),
    SpeedHost("DeiT-B", _timm("deit_base_patch16_224"), "dynamicvit-deit-base-k0.7", batches=LARGE),
    SpeedHost("ViT-B, transformers", _transformers_vit, _quarters(12), batches=LARGE),
    SpeedHost("ViT-L", _timm("vit_large_patch16_224"), _quarters(24), batches=LARGE),
)
