"""Theorem 9 of docs/theorems.md (live): after any change to the host or to the wrapped model,
through either handle, the next call is that of a model wrapped anew after the change."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenprune
from tests.theorems.case import tensors
from tests.theorems.changes import CHANGES, UNDONE, NotHereError
from tests.zoo.rows import randomize_weights
from tokenprune.errors import TokenPruneError

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timm_vit(**options: Any) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5, **options
    )


def timm_eva() -> nn.Module:
    return timm.models.Eva(
        img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5
    )


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_labels=5,
        num_hidden_layers=4, num_attention_heads=2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


HOSTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm_vit": (timm_vit, "blocks.2"),
    "timm_eva": (timm_eva, "blocks.2"),
    "hf_vit": (hf_vit, "vit.layers.2"),
}


def wrapped(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = make().eval()
        randomize_weights(host, 1.0)
        return tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()


def anew(model: Any) -> Any:
    """The host of `model` wrapped once more, with the same predictors."""
    fresh = tokenprune.wrap(tokenprune.unwrap(model), RECIPE, verify=False, train=False)
    fresh._pruning.added.update(model._pruning.added)
    return fresh


def agree(model: Any, images: Tensor) -> None:
    """Both give the same bits, or both refuse."""
    with torch.no_grad():
        try:
            expected = tensors(anew(model)(images))
        except TokenPruneError as error:
            with pytest.raises(type(error)):
                model(images)
            return
        found = tensors(model(images))
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [*CHANGES, *UNDONE])
def test_9_a_change_is_seen(name: str, host: str) -> None:
    make, path = HOSTS[host]
    model = wrapped(make)
    object.__setattr__(model, "example", IMAGES)
    before = tensors(model(IMAGES))
    through_host = len(name) % 2 == 0 and name != "double_precision"  # that leaves predictors
    handle = tokenprune.unwrap(model) if through_host else model
    try:
        scope = UNDONE[name](handle, path) if name in UNDONE else nullcontext()
        with scope:
            if name in CHANGES:
                CHANGES[name](handle, path)
            now = next(p.dtype for p in model.parameters())
            agree(model, IMAGES.to(now))
    except NotHereError:
        pytest.skip("this host has nothing of that kind")
    if name in UNDONE:
        assert all(map(torch.equal, tensors(model(IMAGES)), before))
