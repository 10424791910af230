"""Methods as objects, and by name."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tokenprune import methods
from tokenprune.errors import PlanError, RecipeError, RegistrationError, UnknownRecipeError
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.recipe import methods as registered
from tokenprune.runtime.model import pruning_of


def vit() -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**small, num_classes=3).eval()


@pytest.mark.parametrize("name", methods.list_methods())
def test_each_has_a_name_that_makes_its_recipe(name: str) -> None:
    method = methods.method_named(name)
    assert method is not None
    assert method.name == name
    recipe = load_recipe(method)
    assert recipe == load_recipe(name)
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert name in tokenprune.list_recipes()
    assert type(method).__doc__


def test_wrap_takes_one() -> None:
    model = tokenprune.wrap(vit(), methods.ToMe(r=3), verify=False, train=False)
    assert pruning_of(model).recipe.name == "tome-r3"
    assert pruning_of(model).budget.counts([16] * 4) == (13, 10, 7, 4)
    model = tokenprune.wrap(vit(), methods.DynamicViT(keep_ratio=0.5), verify=False, train=False)
    assert pruning_of(model).recipe.scorer == "learned"


@pytest.mark.parametrize("threshold", [None, 0.5, 0.3])
def test_learned_trains_on_the_tokens_that_eval_keeps(threshold: float | None) -> None:
    recipe = methods.Learned(keep_ratio=0.6).recipe()
    recipe["sampling"]["counts"] = "fixed"  # or a threshold, which decides about each token
    model = tokenprune.wrap(vit(), {"version": 1, **recipe}, verify=False)
    for predictor in model.token_predictors:
        torch.nn.init.normal_(predictor.out_proj[-1].weight, std=3.0)
    model.set_threshold(threshold)
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen, of_eval = model.eval()(images, return_trace=True)
        trained, of_training = model.train()(images, return_trace=True)
        again = model(images)
    for eval_stage, stage in zip(of_eval.stages, of_training.stages, strict=True):
        assert torch.equal(stage.decision.bool(), eval_stage.decision.bool())
    torch.testing.assert_close(trained, seen, atol=1e-5, rtol=1e-5)
    assert torch.equal(trained, again)


def test_noise_needs_probabilities() -> None:
    recipe = {"version": 1, "scorer": "token-norm", "sampling": {"noise": "spread"}}
    with pytest.raises(PlanError, match=r"TokenNorm are no probabilities.* `scorer: learned`"):
        tokenprune.wrap(vit(), {**recipe, "schedule": {"keep_ratio": 0.7}}, verify=False)


def test_they_are_checked_and_never_change() -> None:
    with pytest.raises(RecipeError, match=r"ToMe\(r=0\) is no method:\n.*r: "):
        methods.ToMe(r=0)
    with pytest.raises(RecipeError, match=r"EViT\(keep_ratio=1.5\) is no method"):
        methods.EViT(keep_ratio=1.5)
    with pytest.raises(RecipeError, match="keep: Extra inputs"):
        methods.EViT(keep=0.5)
    with pytest.raises(ValueError, match="frozen"):
        methods.EViT().keep_ratio = 0.5  # type: ignore[misc]
    for name in ("tome-k0.7", "tome-r0", "evit-r3", "evit-k1.5", "tom-r13"):
        with pytest.raises(UnknownRecipeError, match=r"No recipe is named .* Did you mean"):
            load_recipe(name)


def test_another_package_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered._METHODS, "_known", dict(registered._METHODS._known))

    class Halving(methods.Method):
        """Half of the tokens leave at one block."""

        letter = ("b", "block")
        block: int = 2

        def recipe(self) -> dict[str, Any]:
            return {"scorer": "token-norm", "stages": [{"block": self.block, "keep_ratio": 0.5}]}

    entry = EntryPoint("halving", "here:Halving", registered.ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Halving)
    monkeypatch.setattr(registered._METHODS, "_group", registered.ENTRY_POINTS)
    installed = {registered.ENTRY_POINTS: [entry]}
    monkeypatch.setattr("tokenprune.registry.entry_points", lambda group: installed.get(group, []))
    assert "halving-b2" in methods.list_methods()
    model = tokenprune.wrap(vit(), "halving-b1", verify=False, train=False)
    assert pruning_of(model).plan.blocks == (1,)
    with pytest.raises(RegistrationError, match="A method named 'halving' is registered already"):
        methods.register_method("halving")(Halving)
