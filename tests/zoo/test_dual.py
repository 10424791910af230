"""Dual models (CLIP and its kin): the vision tower is pruned, and with it all that asks it."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenprune
from tests.zoo.hosts import HF, TEXT
from tests.zoo.rows import randomize_weights
from tokenprune.errors import UnsupportedHostError

pytestmark = pytest.mark.slow
RECIPE = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.6}}


def dual(model: str) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, model)
    host = cls(cls.config_class(text_config=TEXT, vision_config=HF)).eval()
    randomize_weights(host, 20.0)
    return host


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def words(batch: int = 2) -> Tensor:
    return torch.randint(0, 48, (batch, 8), generator=torch.Generator().manual_seed(batch))


def features(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.get_image_features(pixel_values=pixels).pooler_output


@pytest.mark.parametrize(("name", "restore"), [("CLIPModel", True), ("SiglipModel", False)])
def test_a_wrapped_tower_prunes_the_features_and_the_dual_model(name: str, restore: bool) -> None:
    host, pixels, texts = dual(name), images(), words()
    dense = features(host, pixels)
    with torch.no_grad():
        spoken = host.get_text_features(input_ids=texts).pooler_output
    tower = host.vision_model
    host.vision_model = tokenprune.wrap(tower, RECIPE, restore=restore)
    certificate = tokenprune.verify(host.vision_model, {"pixel_values": pixels})
    assert [check.name for check in certificate.checks if not check.passed] == []

    pruned = features(host, pixels)
    assert pruned.shape == dense.shape
    assert not torch.allclose(pruned, dense)
    with host.vision_model.using("dense"):
        assert torch.equal(features(host, pixels), dense)
    host.vision_model.set_keep_ratio(1.0)
    assert torch.equal(features(host, pixels), dense)
    host.vision_model.set_keep_ratio(0.6)
    with torch.no_grad():
        out = host(pixel_values=pixels, input_ids=texts)
        assert torch.equal(host.get_text_features(input_ids=texts).pooler_output, spoken)
    length = tower.embeddings.num_positions if restore else None
    kept = 16 * 0.36 // 1 + (1 if name == "CLIPModel" else 0)
    assert out.vision_model_output.last_hidden_state.shape[1] == (length or kept)
    torch.testing.assert_close(
        out.image_embeds, torch.nn.functional.normalize(pruned, dim=-1), rtol=1e-4, atol=1e-5
    )
    host.vision_model = tokenprune.unwrap(host.vision_model)
    assert torch.equal(features(host, pixels), dense)


def test_contrastive_training_reaches_the_predictors() -> None:
    host = dual("SiglipModel")
    host.vision_model = tokenprune.wrap(host.vision_model, RECIPE, restore=False)
    host.train()
    host(pixel_values=images(3), input_ids=words(3), return_loss=True).loss.backward()
    for parameter in host.vision_model.token_predictors.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_the_whole_dual_model_is_proven_though_each_image_meets_every_text() -> None:
    host = dual("CLIPModel")
    inputs = {"pixel_values": images(), "input_ids": words()}
    with pytest.raises(UnsupportedHostError, match=r"vision_model_output.*restore=True"):
        tokenprune.wrap(host, RECIPE, example_inputs=inputs)
    model = tokenprune.wrap(host, RECIPE, example_inputs=inputs, restore=True, train=False)
    assert all(check.passed for check in tokenprune.verify(model, inputs, gradients=False).checks)


@pytest.mark.parametrize("restore", [True, False])
def test_tokens_inside_a_nested_output_are_given_back_or_left_short(restore: bool) -> None:
    inputs = {"pixel_values": images(), "input_ids": words()}
    host = dual("CLIPModel")
    model = tokenprune.wrap(
        host, RECIPE, example_inputs=inputs, restore=restore, verify=False
    ).eval()
    with torch.no_grad():
        tokens = model(**inputs).vision_model_output.last_hidden_state
        with model.using("mask"):
            assert model(**inputs).vision_model_output.last_hidden_state.shape == (2, 17, 32)
    assert tokens.shape == (2, 17 if restore else 1 + 5, 32)
