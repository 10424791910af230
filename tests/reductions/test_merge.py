"""Merging: ToMe as published, without parameters, on the path that eval runs."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import tokenprune
from tests.toys.vit import randomize_weights
from tokenprune.errors import HostError, KeepIndicesError, PlanError, RecipeError
from tokenprune.recipe import Recipe

SIZE, CLASSES = 32, 5


def vit(name: str = "deit_tiny_patch16_224", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    host = timm.create_model(name, **{**given, "num_classes": CLASSES, **options}).eval()
    randomize_weights(host, 3.0)
    return host


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))


def tome(host: Any, x: Tensor, r: int) -> Tensor:
    """ToMe written out (Bolya et al., 2023): `r` tokens leave in the middle of every block."""
    x = host.patch_embed(x)
    x = host.norm_pre(host.patch_drop(host._pos_embed(x)))
    prefix, size = host.num_prefix_tokens, torch.ones(*x.shape[:2])
    for block in host.blocks:
        attention, given = block.attn, block.norm1(x)
        batch, length, dim = given.shape
        heads, width = attention.num_heads, dim // attention.num_heads
        q, k, v = attention.qkv(given).view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(width) + size.log()[:, None, None, :]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim)
        x = x + block.ls1(attention.proj(mixed))
        metric = F.normalize(k.mean(1), dim=-1)
        each = [merged(*image, r, prefix) for image in zip(x, metric, size, strict=True)]
        x, size = (torch.stack(parts) for parts in zip(*each, strict=True))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return host.forward_head(host.norm(x))


def merged(x: Tensor, metric: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One image: its prefix tokens, what is left of the even places in order, the odd places."""
    places = range(prefix, len(x))
    even, odd = [p for p in places if p % 2 == 0], [p for p in places if p % 2 == 1]
    cosines = metric[even] @ metric[odd].T
    best, partner = cosines.max(1)
    leave = best.argsort(descending=True)[: min(r, len(places) // 2)].tolist()
    total, summed = size.clone(), x * size[:, None]
    for place in leave:
        to = odd[int(partner[place])]
        total[to] += size[even[place]]
        summed[to] += x[even[place]] * size[even[place]]
    left = [*range(prefix), *(p for i, p in enumerate(even) if i not in leave), *odd]
    return summed[left] / total[left, None], total[left]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("r", [5, 20])
@torch.no_grad()
def test_tome_is_the_papers(name: str, r: int) -> None:
    host = vit(name)
    model = tokenprune.wrap(host, f"tome-r{r}", verify=False, train=False).eval()
    expected = tome(host, images(), r)
    output, trace = model(images(), return_trace=True)
    assert float((output - expected).abs().max() / expected.abs().max()) < 1e-4
    left = [64]
    for stage in trace.stages:
        left.append(left[-1] - min(r, left[-1] // 2))
        assert stage.num_tokens == left[-1]


def test_layer_scale_and_means_are_served() -> None:
    """What public code gets wrong: the branch's scale, and a mean that ignores sizes."""
    host = vit("deit3_small_patch16_224", global_pool="avg", class_token=True)
    certificate = tokenprune.verify(tokenprune.wrap(host, "tome-r9", train=False), images())
    assert "merged = expanded" in str(certificate)


def test_it_adds_no_parameters_and_saves_and_loads(tmp_path: Path) -> None:
    host = vit()
    model = tokenprune.wrap(host, "merge-k0.6", verify=False).eval()
    assert list(model.state_dict()) == list(host.state_dict())
    assert model._pruning.plan.blocks == (1, 2, 3)
    assert {site.place for site in model._pruning.plan.sites} == {"middle"}
    tokenprune.save(model, tmp_path / "saved")
    loaded = tokenprune.load(tmp_path / "saved", vit(), verify=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))


def test_training_runs_the_merged_path_and_its_gradients_are_those_of_expanded_tokens() -> None:
    host = vit().double()
    model = tokenprune.wrap(host, "merge-k0.6").train()
    x = images().double()
    output, trace = model(x, return_trace=True)
    output.square().sum().backward()
    found = {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}
    model.zero_grad()
    groups = tuple(stage.groups for stage in trace.stages)
    programs = model._pruning.programs({"x": x})
    settings = tokenprune.rewrite.settings.CallSettings((), sample=False, groups=groups)
    expanded, *_ = programs.get(model, "expanded").run(model, settings, x=x)
    torch.testing.assert_close(expanded, output)
    expanded.square().sum().backward()
    for name, parameter in host.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)


@pytest.mark.parametrize("restore", [True, False])
@torch.no_grad()
def test_outputs_that_hold_tokens(restore: bool) -> None:
    host = vit(global_pool="", num_classes=0)
    model = tokenprune.wrap(host, "merge-k0.6", restore=restore, train=False).eval()
    tokens, trace = model(images(), return_trace=True)
    kept = trace.stages[-1]
    if not restore:
        assert tokens.shape[1] == 1 + kept.num_tokens
        return
    assert tokens.shape[1] == 65
    patches = tokens[:, 1:]
    mine = patches.gather(1, kept.groups.unsqueeze(-1).expand_as(patches))
    assert torch.equal(mine, patches)  # each has the value of the one that stands for it


def test_macs_count_what_is_left_and_the_matching() -> None:
    counted = tokenprune.profile(tokenprune.wrap(vit(), "merge-k0.5", verify=False, train=False))
    assert counted.tokens_per_block == (64, 64, 32, 16)
    assert all(macs > 0 for macs in counted.predictor_macs)
    falling = tokenprune.wrap(vit(depth=6), "merge-falling-k0.7", verify=False, train=False)
    left = tokenprune.profile(falling).tokens_per_block
    drops = [a - b for a, b in pairwise(left)]
    assert drops == sorted(drops, reverse=True)
    assert falling._pruning.budget.keep_ratios[-1] == pytest.approx(0.343)


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("tome-r33", PlanError, "`r: 33` tokens cannot leave 64 at once; half of them can, 32"),
        (
            {"version": 1, "mode": "merge", "scorer": "random", "schedule": {"keep_ratio": 0.7}},
            PlanError,
            "says too little for `mode: merge`; that takes similarity",
        ),
        ({"version": 1, "mode": "merge", "schedule": {"r": 0}}, RecipeError, r"schedule\.r"),
        (
            {"version": 1, "mode": "merge", "schedule": {"r": 4, "keep_ratio": 0.5}},
            RecipeError,
            "exactly one of `keep_ratio` and `r`",
        ),
        (
            {"version": 1, "mode": "merge", "schedule": {"r": 4, "falling": True}},
            RecipeError,
            "`falling` goes with `keep_ratio` alone",
        ),
    ],
)
def test_bad_recipes(recipe: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenprune.wrap(vit(), recipe, verify=False, train=False)


def test_what_a_merged_model_cannot_be_asked() -> None:
    model = tokenprune.wrap(vit(), "merge-k0.6", verify=False, train=False)
    with pytest.raises(HostError, match=r"no mask path.*Choose one of dense, gather"):
        model.using("mask").__enter__()
    with pytest.raises(KeepIndicesError, match="the mean of several"):
        model.using(keep_indices=[torch.zeros(1, 3, dtype=torch.int64)] * 3).__enter__()
    with pytest.raises(PlanError, match="no probabilities"):
        model.set_threshold(0.5)


@torch.no_grad()
def test_other_sizes_types_and_no_image() -> None:
    model = tokenprune.wrap(vit(dynamic_img_size=True), "tome-r9", verify=False, train=False).eval()
    _, trace = model(torch.randn(1, 3, 48, 48), return_trace=True)
    assert [stage.num_tokens for stage in trace.stages] == [123, 103, 83, 63]  # 9 of 64 each time
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images())
    assert float((low - model(images())).abs().max() / low.abs().max()) < 0.1
    model.set_keep_ratio(1.0)
    assert torch.equal(model(images()), tokenprune.unwrap(model)(images()))
    fixed = tokenprune.wrap(vit(), "merge-k0.5", verify=False, train=False).eval()
    assert fixed(images()[:0]).shape == (0, CLASSES)


def test_a_text_merges_its_padding_with_padding() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    config = transformers.BertConfig(**sizes, num_hidden_layers=4, num_attention_heads=2)
    host = transformers.BertModel(config, add_pooling_layer=False).eval()
    real = torch.ones(2, 16, dtype=torch.int64)
    real[1, 9:] = 0
    given = {"input_ids": torch.arange(32).view(2, 16), "attention_mask": real}
    model = tokenprune.wrap(host, "merge-k0.6", example_inputs=given, restore=True).eval()
    _, trace = model(**given, return_trace=True)
    for stage in trace.stages:
        assert torch.equal(real[:, 1:].gather(1, stage.groups), real[:, 1:])


def test_names_of_recipes() -> None:
    assert {"merge-k0.7", "merge-falling-k0.7", "tome-r13"} <= set(tokenprune.list_recipes())
    recipe = Recipe.parse({"version": 1, "mode": "merge", "schedule": {"keep_ratio": 0.7}})
    assert (recipe.scorer, recipe.place) == ("similarity", "middle")
