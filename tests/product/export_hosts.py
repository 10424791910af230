"""The five kinds of hosts whose export is promised, as small as they come."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokenprune
from tests.zoo.rows import randomize_weights
from tokenprune.models.lvvit import LVViT

__all__ = ["HALF", "HOSTS", "TINY", "images", "tensors_of", "wrapped"]

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY |= {"num_classes": 3}
HF = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
HF |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 4, "num_classes": 3}
SWIN |= {"depths": (1, 1), "num_heads": (2, 4)}
# Exporters take seconds for every block, so there is one, or two where a host is of two grids.
HALF: dict[str, Any] = {"version": 1, "stages": [{"block": 0, "keep_ratio": 0.5}]}
BYPASS = {"version": 1, "stages": [{"block": 1, "keep_ratio": 0.5}], "mode": "bypass"}


@dataclass(frozen=True)
class Host:
    make: Callable[..., Any]
    recipe: dict[str, Any]
    argument: str = "x"
    side: int = 16


def hf_vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF))


HOSTS = {
    "deit": Host(partial(timm.create_model, "deit_tiny_patch16_224", **TINY), HALF),
    "eva": Host(partial(timm.create_model, "eva02_tiny_patch14_224", **TINY), HALF),
    "lvvit": Host(
        partial(LVViT, **{**TINY, "img_size": 32, "patch_size": 8}, stem_width=4), HALF, side=32
    ),
    "swin": Host(
        partial(timm.create_model, "swin_tiny_patch4_window7_224", **SWIN),
        BYPASS,
    ),
    "vit": Host(hf_vit, HALF, "pixel_values"),
}


@cache
def _wrapped(name: str) -> Any:
    torch.manual_seed(0)
    host = HOSTS[name].make().eval()
    randomize_weights(host, 20.0)
    model = tokenprune.wrap(host, HOSTS[name].recipe, verify=False, train=False)
    with torch.no_grad():
        for module in model.token_predictors.modules():
            if isinstance(module, nn.Linear):  # as drawn, all tokens score nearly alike
                module.weight.normal_(std=module.in_features**-0.5)
    return model


def wrapped(name: str) -> Any:
    """A wrapped host in eval mode; the same object in every call."""
    return _wrapped(name).eval()


def images(name: str, batch: int) -> dict[str, Tensor]:
    """Random images under the name of the host's argument."""
    side = HOSTS[name].side
    return {HOSTS[name].argument: torch.randn(batch, 3, side, side)}


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
