"""Small hosts, and what a client's model is compared with: one that is wrapped anew."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import tokenprune

__all__ = ["IMAGES", "RECIPE", "hf_vit", "keeping_all", "logits", "rewrapped", "vit", "wrapped"]

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.5}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(num_classes=5, **small).eval()


def hf_vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


def wrapped(host: nn.Module, seed: int = 1) -> Any:
    """In eval mode."""
    torch.manual_seed(seed)
    return tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()


def rewrapped(host: nn.Module, model: Any) -> Any:
    """`host` wrapped, with the predictors of `model`."""
    other = wrapped(host, seed=2)
    other.token_predictors.load_state_dict(model.token_predictors.state_dict())
    return other


def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def keeping_all(model: Any) -> Tensor:
    """The output of the gather path where every token stays."""
    every = torch.arange(16).expand(2, 16)
    with model.using("gather", keep_indices=[every, every]):
        return logits(model)
