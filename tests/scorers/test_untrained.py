"""Scorers without parameters: what they keep, where they run, and what they refuse by name."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import PlanError, RecipeError, RegistrationError, UnknownRecipeError
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.runtime.model import pruning_of
from tokenprune.scorers import SCORERS, KeyNorm, Random, Scorer, TokenNorm

NAMES = ["key-norm", "random", "token-norm"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    host = timm.models.vision_transformer.VisionTransformer(**small, num_classes=5, **options)
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return host.eval()


def kept(model: Any, stage: int = 0, **using: Any) -> Tensor:
    with torch.no_grad(), model.using(**using):
        return model(IMAGES, return_trace=True)[1].stages[stage].keep_indices


def test_large_tokens_and_small_keys_stay() -> None:
    tokens = torch.tensor([[3.0, 1.0, 2.0]])[..., None] * torch.ones(4)
    assert TokenNorm()(tokens)[..., 0].argsort(descending=True).tolist() == [[0, 2, 1]]
    keys = torch.tensor([[[5.0, 1.0, 3.0], [5.0, 2.0, 3.0]]])[..., None] * torch.ones(4)
    assert KeyNorm()(tokens, keys=keys)[..., 0].argsort(descending=True).tolist() == [[1, 2, 0]]
    drawn = Random()(tokens, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, Random()(tokens, generator=torch.Generator().manual_seed(0)))


def test_key_norm_reads_the_block_before_at_an_entry_and_its_own_at_a_middle() -> None:
    host = vit()
    seen: dict[int, Tensor] = {}
    for number in (0, 1):
        host.blocks[number].attn.qkv.register_forward_hook(
            lambda module, args, out, n=number: seen.__setitem__(n, out.detach())
        )
    with torch.no_grad():
        host(IMAGES)
    for place, block in (("entry", 0), ("middle", 1)):
        recipe = {"version": 1, "scorer": "key-norm", "place": place}
        recipe |= {"stages": [{"block": 1, "keep_ratio": 0.5}]}
        model = tokenprune.wrap(vit(), recipe, train=False).eval()
        norms = seen[block].reshape(2, 17, 3, 2, 8)[:, 1:, 1].norm(dim=-1).mean(-1)
        smallest = norms.argsort(dim=1)[:, :8].sort(dim=1).values
        assert torch.equal(kept(model), smallest)


def test_random_draws_again_in_each_call_and_follows_a_generator() -> None:
    model = tokenprune.wrap(vit(), "random-k0.5", train=False).eval()
    assert not torch.equal(kept(model), kept(model))
    one, other = (kept(model, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_training_runs_the_gather_path_and_the_state_has_no_new_key(name: str) -> None:
    host = vit()
    keys = list(host.state_dict())
    model = tokenprune.wrap(host, f"{name}-k0.7").train()
    output, trace = model(IMAGES, return_trace=True)
    assert [stage.num_tokens for stage in trace.stages] == [11, 7, 5]
    assert trace.patch_tokens.shape == (2, 5, 16)
    output.sum().backward()
    assert list(model.state_dict()) == keys
    assert "gradient" not in str(tokenprune.verify(model))


def test_a_hierarchical_host_is_bypassed_by_name(tmp_path: Any) -> None:
    swin = timm.models.swin_transformer.SwinTransformer
    small = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_classes": 3}

    def host() -> nn.Module:
        torch.manual_seed(0)
        return swin(**small, depths=(1, 4), num_heads=(2, 2)).eval()

    model = tokenprune.wrap(host(), "token-norm-k0.4", train=False).eval()
    assert pruning_of(model).recipe.mode == "bypass"
    assert [s.keep_ratio for s in pruning_of(model).recipe.resolved_stages] == [0.4, 0.2, 0.1]
    again = tokenprune.load(tokenprune.save(model, tmp_path / "saved"), host())
    assert torch.equal(again.eval()(IMAGES), model(IMAGES))
    with pytest.raises(PlanError, match=r"keys of its 64 tokens .* found keys of shape"):
        tokenprune.wrap(host(), "key-norm-k0.7")


def test_names_of_recipes_for_any_host() -> None:
    assert {f"{name}-k0.7" for name in NAMES} <= set(list_recipes())
    recipe = load_recipe("random-k0.35")
    assert (recipe.scorer, recipe.schedule.keep_ratio) == ("random", 0.35)  # type: ignore[union-attr]
    assert recipe.resolved_stages == ()
    for name in ("learnt-k0.7", "random-k7", "random", "randm-k0.7"):
        with pytest.raises(UnknownRecipeError, match="No recipe is named"):
            load_recipe(name)
    assert Recipe.from_text(recipe.to_yaml()) == recipe


def test_what_has_no_probabilities_takes_no_threshold() -> None:
    model = tokenprune.wrap(vit(), "token-norm-k0.7", train=False).eval()
    before = pruning_of(model).budget
    with pytest.raises(PlanError, match=r"threshold=0.5, but the scores of TokenNorm are no prob"):
        model.set_threshold(0.5)
    assert pruning_of(model).budget is before
    recipe = {"version": 1, "scorer": "random", "schedule": {"keep_ratio": 0.7}}
    with pytest.raises(PlanError, match="scores of Random are no probabilities"):
        tokenprune.wrap(vit(), {**recipe, "sampling": {"selection": "threshold"}})


def test_keys_before_the_first_block_do_not_exist() -> None:
    recipe = {"version": 1, "scorer": "key-norm", "stages": [{"block": 0, "keep_ratio": 0.5}]}
    with pytest.raises(PlanError, match=r"in the block before block 0, but found no attention"):
        tokenprune.wrap(vit(), recipe)


def test_unknown_and_taken_names() -> None:
    with pytest.raises(RecipeError, match=r"no scorer named 'key-nrm'. Did you mean 'key-norm'"):
        Recipe.parse({"version": 1, "scorer": "key-nrm", "schedule": {"keep_ratio": 0.7}})
    with pytest.raises(RegistrationError, match=r"A scorer named 'random' is registered already"):
        SCORERS.register("random")(TokenNorm)
    assert SCORERS["random"] is Random


def test_a_scorer_of_ones_own_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCORERS, "_known", dict(SCORERS._known))

    class Middle(Scorer):
        def forward(self, tokens: Tensor, present: Tensor | None = None, **needed: Any) -> Tensor:
            places = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1).float()
            score = -(places - tokens.shape[1] / 2).abs()
            return torch.stack([score, -score], dim=-1)

    SCORERS.register("middle-of-the-image", replace=True)(Middle)
    model = tokenprune.wrap(vit(), "middle-of-the-image-k0.5", train=False).eval()
    assert kept(model).tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]] * 2
