"""`auto`: what saves most on a host, and what is said of it."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tokenprune.checkpoints.directory import saved_recipe
from tokenprune.cost import auto
from tokenprune.errors import PlanError, RecipeError, TokenPruneWarning, VerificationError
from tokenprune.recipe import Recipe
from tokenprune.reductions import MODES, Bypass, Remove
from tokenprune.runtime.model import pruning_of

FALLING = "auto chose merge-falling-k0.7: it saves"


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4}
    small |= {"num_heads": 2, "num_classes": 3, **options}
    return timm.models.vision_transformer.VisionTransformer(**small).eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 4), num_heads=(2, 2)
    ).eval()


def wrapped(host: nn.Module, recipe: Any = "auto", **options: Any) -> Any:
    return tokenprune.wrap(host, recipe, **{"verify": False, "train": False, **options})


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registered reductions, to be added to or taken from."""
    known = dict.fromkeys(MODES)
    known = {name: MODES[name] for name in known}
    monkeypatch.setattr(MODES, "_known", known)
    return known


def test_what_saves_most_is_taken_said_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = vit()
    model = wrapped(host, verify=True)
    of_model, counted = pruning_of(model).recipe, tokenprune.profile(model)
    shares = {
        name: 1 - tokenprune.profile(wrapped(vit(), name)).ratio
        for name in ("merge-falling-k0.7", "remove-k0.7")
    }
    assert of_model.name == max(shares, key=lambda name: shares[name]) == "merge-falling-k0.7"
    assert counted.ratio == pytest.approx(1 - shares[of_model.name])
    assert str(counted).endswith(of_model.description)
    assert of_model.description.startswith(f"{FALLING} {100 * shares[of_model.name]:.1f} % of the")
    assert f"{100 * shares['remove-k0.7']:.1f} % by remove-k0.7 (to be tr" in of_model.description

    monkeypatch.setattr(auto, "candidates", None)  # nothing is to choose again
    tokenprune.save(model, tmp_path / "m")
    assert saved_recipe(tmp_path / "m") == of_model
    loaded = tokenprune.load(tmp_path / "m", vit(), verify=False, train=False).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_grid_gets_what_serves_it_and_is_told_why_others_do_not() -> None:
    recipe = pruning_of(wrapped(swin(), "auto-k0.5")).recipe
    assert recipe.name == "windows-falling-k0.5"
    assert "% by skip-k0.5, " in recipe.description  # no training
    assert "% by bypass-k0.5 (to be trained)" in recipe.description
    told = "merge-k0.5, remove-k0.5 are refused: Block 0 ('layers.0.blocks.0') has to keep all its"
    assert told in recipe.description
    assert ".py" not in recipe.description  # no path of the machine where it was chosen


def test_a_reduction_of_another_package_wins_where_it_saves_more(modes: dict[str, Any]) -> None:
    class Most(Bypass):
        name: ClassVar[str] = "most"

        @classmethod
        def ratios(cls, keep_ratio: float, stages: int, patches: int) -> list[float]:
            return [keep_ratio / 50] * stages

    del modes["windows"], modes["skip"]
    modes["most"] = Most
    made = []
    for recipe in ("auto", "most-k0.7"):
        host = swin()
        torch.manual_seed(1)
        made.append(wrapped(host, recipe, verify=recipe == "auto"))
    pruning = pruning_of(made[0])
    assert (pruning.recipe.name, pruning.method.reduction) == ("most-k0.7", Most)
    assert pruning.plan == pruning_of(made[1]).plan
    assert "% by bypass-k0.7 (to be trained)" in pruning.recipe.description
    states = [model.state_dict() for model in made]  # predictors: nothing was drawn in between
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_of_what_saves_about_the_same_the_simplest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "CLOSE", 0.5)
    assert pruning_of(wrapped(vit())).recipe.name == "merge-k0.7"


def test_a_host_that_gains_nothing_is_wrapped_with_a_warning() -> None:
    host = vit(num_classes=200_000)
    with pytest.warns(TokenPruneWarning, match=r"saves little: merge-k0.7, which .* 2\.2 %"):
        model = wrapped(host)
    assert 0.95 < tokenprune.profile(model).ratio < 1


def test_what_is_not_proven_is_passed_over_and_said(
    monkeypatch: pytest.MonkeyPatch, modes: dict[str, Any]
) -> None:
    del modes["skip"]
    real = tokenprune.wrapping.verify_wrapped

    def verify(model: Any, *args: Any, **options: Any) -> Any:
        if pruning_of(model).recipe.mode == "merge":
            raise VerificationError("It does not hold. Report it.")
        return real(model, *args, **options)

    monkeypatch.setattr("tokenprune.wrapping.verify_wrapped", verify)
    recipe = pruning_of(wrapped(vit(), verify=True)).recipe
    assert recipe.name == "remove-k0.7"
    assert "merge-falling-k0.7 is refused: It does not hold." in recipe.description


def test_where_nothing_serves_every_reason_is_said(modes: dict[str, Any]) -> None:
    for name in list(modes):
        if name not in ("remove", "fuse"):
            del modes[name]
    host = vit(depth=1, class_token=False, global_pool="avg")
    with pytest.raises(PlanError) as caught:
        wrapped(host)
    first, *reasons = str(caught.value).splitlines()
    assert first == "auto finds nothing that serves this VisionTransformer:"
    assert [reason.split(" is refused")[0] for reason in reasons] == [
        "  - evit-k0.7",
        "  - remove-k0.7",
    ]
    assert Remove.name in modes


def test_a_plan_that_does_not_run_is_passed_over() -> None:
    class EachToken(nn.Module):
        """Takes its tokens one by one, so none can leave before."""

        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.vit.forward_features(x)  # type: ignore[operator]
            x = torch.stack([x[:, place] for place in range(x.shape[1])], 1)
            return self.vit.head(x[:, 0])  # type: ignore[no-any-return, operator]

    images = torch.randn(2, 3, 16, 16)
    model = wrapped(EachToken(), verify=True, example_inputs=images)
    assert model(images).shape == (2, 3)


def test_it_chooses_all_or_nothing() -> None:
    asked: dict[str, Any] = {"version": 1, "mode": "auto", "schedule": {"keep_ratio": 0.5}}
    again = Recipe.from_text(Recipe.parse(asked).to_yaml())
    assert [r.name for r in auto.candidates(again)] == [
        r.name for r in auto.candidates(Recipe.parse(asked))
    ]
    for part in ({"scorer": "random"}, {"schedule": {"r": 3}}, {"stages": [], "schedule": None}):
        with pytest.raises(RecipeError, match=r"chooses scorer, place and stages as well|no stage"):
            Recipe.parse({**asked, **part})
    mine = Recipe.parse({**asked, "loss": {"ratio": 1.0}, "description": "Mine."})
    assert {recipe.loss.ratio for recipe in auto.candidates(mine)} == {1.0}
    assert tokenprune.methods.method_named("auto-k0.5") == tokenprune.methods.Auto(keep_ratio=0.5)
