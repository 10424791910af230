"""`selection: threshold` on tiny models of the libraries, and what surrounds it."""

from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokenprune
from tests.toys.vit import randomize_weights
from tokenprune.errors import KeepIndicesError, PlanError, RecipeError
from tokenprune.losses import ratio_loss
from tokenprune.ops.packing import merge_packed, pack, take_packed
from tokenprune.ops.selection import above_threshold
from tokenprune.recipe import Recipe
from tokenprune.runtime.model import pruning_of

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
RECIPE = {
    "version": 1,
    "schedule": {"blocks": [1, 2], "keep_ratio": 0.6},
    "sampling": {"selection": "threshold", "threshold": 0.4},
}
BYPASS = {**RECIPE, "mode": "bypass"}


def from_timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options})


def swin() -> nn.Module:
    options = {"depths": (1, 3), "num_heads": (2, 2), "window_size": 4, "patch_size": 4}
    given = {"img_size": 32, "embed_dim": 16, "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", **given, **options)


def vit_hf(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    config = ViTConfig(**sizes, num_hidden_layers=4, num_attention_heads=2, num_labels=5)
    return ViTForImageClassification(config)


def tokens_hf() -> nn.Module:
    from transformers import ViTModel

    return ViTModel(vit_hf().config, add_pooling_layer=False)


HOSTS = {
    "deit": (partial(from_timm, "deit_tiny_distilled_patch16_224", patch_size=8), RECIPE),
    "eva_rope": (partial(from_timm, "eva02_tiny_patch14_224", patch_size=8), RECIPE),
    "cait": (partial(from_timm, "cait_xxs24_224", patch_size=8), RECIPE),
    "swin": (swin, BYPASS),
}


@pytest.fixture(scope="module")
def deit() -> Any:
    return made(from_timm("deit_tiny_patch16_224", patch_size=8), verify=False)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def made(host: nn.Module, recipe: Any = RECIPE, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tokenprune.wrap(host, recipe, train=False, **options).eval()
        randomize_weights(model, 3.0)
    return model


def halve(model: Any, **inputs: Any) -> Any:
    """The call with a threshold between the scores, half of which are above it at the first stage;
    its trace."""
    with torch.no_grad(), model.using("mask"):
        _, trace = model(**inputs, return_trace=True)
    scores = trace.stages[0].keep_logits[..., 0].exp().flatten().sort().values
    middle = len(scores) // 2
    model.set_threshold(float(scores[middle - 1 : middle + 1].mean()))
    with torch.no_grad():
        return model(**inputs, return_trace=True)


def difference(ours: Any, theirs: Any) -> float:
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_hosts_are_certified_and_a_batch_is_each_image_alone(name: str) -> None:
    build, recipe = HOSTS[name]
    model = made(build(), recipe)  # verified, with sets of different sizes
    x = images(5)
    output, trace = halve(model, x=x)
    kept = trace.stages[0].decision.sum(1)
    assert len(set(kept.tolist())) > 1
    with torch.no_grad():
        for image in range(5):
            assert difference(model(x[image : image + 1]), output[image : image + 1]) < 1e-5
        with model.using("mask"):
            assert difference(model(x), output) < 1e-5


def test_a_host_that_also_gives_a_loss() -> None:
    x, labels = images(6), torch.arange(6) % 5
    model = made(vit_hf(), example_inputs={"pixel_values": x, "labels": labels})
    output, trace = halve(model, pixel_values=x, labels=labels)
    assert len(set(trace.stages[0].decision.sum(1).tolist())) > 1
    expected = nn.functional.cross_entropy(output.logits, labels)
    assert torch.allclose(output.loss, expected)  # of the whole batch, not of one bucket


@pytest.mark.slow
@pytest.mark.parametrize("restore", [True, False])
def test_outputs_that_hold_tokens(restore: bool) -> None:
    x = images(6)
    model = made(tokens_hf(), restore=restore)
    output, trace = halve(model, pixel_values=x)
    kept = trace.stages[-1].decision.sum(1).int().tolist()
    tokens = output.last_hidden_state
    assert tokens.shape[1] == 17 if restore else 1 + max(kept)
    with torch.no_grad():
        for image in range(6):
            alone = model(pixel_values=x[image : image + 1]).last_hidden_state[0]
            assert difference(alone, tokens[image, : len(alone)]) < 1e-5
            assert not tokens[image, len(alone) :].any()


def test_gradients_reach_the_images_and_the_weights_in_eval() -> None:
    model = made(vit_hf())
    x = images(4).requires_grad_()
    halve(model, pixel_values=x)
    model(pixel_values=x).logits.square().sum().backward()
    assert all(bool(torch.isfinite(g).all() and g.abs().sum() > 0) for g in (x.grad,))
    assert float(model.classifier.weight.grad.abs().sum()) > 0


def test_the_threshold_can_change_and_go_without_a_new_trace(deit: Any) -> None:
    model = deit
    traced = tokenprune.cache_info(model).traced
    model.set_keep_ratio(0.6)
    x, tokens = images(4), []
    for threshold in (0.01, 0.5, 0.99):
        model.set_threshold(threshold)
        with torch.no_grad():
            tokens.append(float(model(x, return_trace=True)[1].stages[0].num_tokens))
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[-1] >= 1
    model.set_threshold(None)
    with torch.no_grad():
        assert model(x, return_trace=True)[1].stages[0].num_tokens == 9
    assert tokenprune.cache_info(model).traced == traced


@pytest.mark.slow
def test_saved_models_keep_their_threshold(tmp_path: Any) -> None:
    build = partial(from_timm, "deit_tiny_patch16_224", patch_size=8)
    model = made(build(), verify=False)
    model.set_threshold(0.25)
    loaded = tokenprune.load(tokenprune.save(model, tmp_path / "one"), build())
    assert pruning_of(loaded).budget.threshold == 0.25
    model.set_threshold(None)
    text = (tokenprune.save(model, tmp_path / "two") / "recipe.yaml").read_text()
    assert "selection: topk" in text


@pytest.mark.slow
def test_macs_of_each_image(deit: Any) -> None:
    model = deit
    costs = tokenprune.ImageMacs(model)
    for ratios in ([0.5, 0.25], [1.0, 0.125]):
        model.set_keep_ratio(ratios)
        kept = [[16 * ratio for ratio in ratios]]
        assert float(costs(torch.tensor(kept))) == tokenprune.profile(model).macs
    _, trace = halve(model, x=images(5))
    found = costs(trace)
    order = trace.stages[0].decision.sum(1).argsort()
    assert found.shape == (5,)
    assert found[order[0]] < found[order[-1]] < costs.dense * 1.2


def test_a_text_keeps_its_real_tokens_first() -> None:
    logits = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9]])
    logits = torch.stack([logits.log(), (1 - logits).log()], dim=-1)
    real = torch.tensor([[True, False, True], [True, True, False]])
    assert above_threshold(logits, 0.5, real=real).tolist() == [
        [True, False, False],
        [False, True, False],
    ]


def test_packed_tokens_come_back_to_their_places() -> None:
    x = torch.randn(3, 4, 2)
    packed = pack(torch.tensor([[0, 2, 3], [1, -1, -1], [2, 3, -1]]), x, 0)
    taken = take_packed(x, packed)
    assert taken.shape == (3, 2, 2)
    merged = merge_packed(x, taken * 10, packed, nn.Identity())
    kept = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]]).bool().unsqueeze(-1)
    assert torch.equal(merged, torch.where(kept, x * 10, x))


def test_a_recipe_says_so_and_profile_counts_what_training_aims_at(deit: Any) -> None:
    recipe = Recipe.parse(RECIPE)
    assert (recipe.sampling.selection, recipe.sampling.buckets) == ("threshold", 4)
    model = deit
    model.set_keep_ratio(0.6)
    model.set_threshold(0.4)
    assert tokenprune.profile(model).tokens_per_block == (16, 9, 5, 5)
    assert "above 0.4 of 16" in str(tokenprune.verify(model))


def test_images_may_differ_if_the_ratio_loss_lets_them() -> None:
    decision = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert float(ratio_loss([decision], [0.5], per_image=False)) == 0.0
    assert float(ratio_loss([decision], [0.5], per_image=True)) == 0.25


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, "half", True])
def test_a_threshold_out_of_range(deit: Any, threshold: Any) -> None:
    model = deit
    with pytest.raises(PlanError, match="give a keep probability between 0 and 1"):
        model.set_threshold(threshold)
    sampling = {"selection": "threshold", "threshold": threshold}
    with pytest.raises(RecipeError, match=r"sampling\.threshold"):
        Recipe.parse({**RECIPE, "sampling": sampling})


def test_messages(deit: Any) -> None:
    model = deit
    x = images(2)
    model.set_threshold(0.5)
    empty = torch.tensor([[0, 1], [-1, -1]])
    with pytest.raises(KeepIndicesError, match="image 1 name no token"):  # noqa: SIM117
        with model.using(keep_indices=[empty, empty]):
            model(x)
    with pytest.raises(RecipeError, match="buckets"):
        Recipe.parse({**RECIPE, "sampling": {"buckets": 0}})
    with pytest.raises(PlanError, match="cannot be exported"):
        torch.export.export(model, (x,))


def test_a_host_that_mixes_images() -> None:
    class Mixes(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + x[:, 0].mean(0)

    host = from_timm("deit_tiny_patch16_224", patch_size=8)
    host.blocks[1] = Mixes(host.blocks[1])
    model = made(host, verify=False)
    x = images(5)
    output, _ = halve(model, x=x)
    with torch.no_grad(), model.using("mask"):
        assert difference(model(x), output) < 1e-5


@torch.no_grad()
def test_forced_sets_may_have_more_padding_than_any_image_needs(deit: Any) -> None:
    first = torch.tensor([[0, 2, 5, 7, -1, -1], [1, 3, -1, -1, -1, -1]])
    second = torch.tensor([[2, 7, -1, -1], [3, -1, -1, -1]])
    with deit.using(keep_indices=[first, second]):
        wide, trace = deit(images(2), return_trace=True)
    with deit.using(keep_indices=[first[:, :4], second[:, :2]]):
        narrow = deit(images(2))
    assert torch.equal(wide, narrow)
    assert [stage.keep_indices.shape[1] for stage in trace.stages] == [4, 2]


def test_tokens_are_packed_unless_a_module_has_hooks(
    deit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, shapes = images(5), list[tuple[int, ...]]()
    output, trace = halve(deit, x=x)
    longest = 1 + int(trace.stages[-1].decision.sum(1).max())
    jagged = next(iter(deit._pruning.cache)).get(deit, "jagged").run
    padded, packed = (Mock(wraps=getattr(jagged, name)) for name in ("padded", "packed"))
    monkeypatch.setattr(jagged, "padded", padded)
    monkeypatch.setattr(jagged, "packed", packed)
    layer = deit.blocks[3].mlp.fc1
    handle = layer.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        assert difference(deit(x), output) < 1e-5
    handle.remove()
    assert shapes == [(5, longest, 32)]
    assert (padded.call_count, packed.call_count) == (0, 0)  # with hooks it is another program
    with torch.no_grad():
        assert torch.equal(deit(x), output)
    assert (padded.call_count, packed.call_count) == (0, 1)


@torch.no_grad()
def test_what_one_batch_is_like_decides_nothing_about_another() -> None:
    model = made(from_timm("eva02_tiny_patch14_224", patch_size=8), verify=False).eval()
    x = images(4)
    halve(model, x=x)
    for batch in (1, 2, 5):
        model(images(batch))
    alone = [model(image[None]) for image in x]
    torch.testing.assert_close(model(x), torch.cat(alone))
