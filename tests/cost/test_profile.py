"""`profile` counts what eval runs: by hand, and against torch; published figures are elsewhere."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tokenprune
from tokenprune.cost.profile import Profile, Profiler, profile
from tokenprune.errors import HostError, NotWrappedError
from tokenprune.runtime.model import pruning_of

STAGES: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
counting = sys.modules["tokenprune.cost.flops"]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}).eval()


def wrapped(host: nn.Module, recipe: Any = STAGES, **options: Any) -> Any:
    return tokenprune.wrap(host, recipe, verify=False, train=False, **options)


@pytest.fixture(scope="module")
def small() -> Any:
    """A wrapped host that takes several image sizes; no test changes it."""
    return wrapped(vit(num_classes=5, dynamic_img_size=True))


def vit_macs(tokens: list[int], dim: int, hidden: int, patches: int, classes: int) -> int:
    """A ViT by hand: per block qkv, Q K^T, A V, projection, MLP; tokens include the class token."""
    blocks = sum(n * (4 * dim**2 + 2 * dim * hidden) + 2 * n * n * dim for n in tokens)
    return blocks + patches * 3 * 8 * 8 * dim + classes * dim


def predictor_macs(patches: int, dim: int) -> int:
    half, quarter = dim // 2, dim // 4
    # the shared half goes through the first output layer once
    return patches * (dim**2 + half * half + half * quarter + quarter * 2) + half * half


def test_a_hand_count_attention_included(small: Any) -> None:
    counted = profile(small)
    assert counted.tokens_per_block == (16, 9, 5)
    assert counted.predictor_macs == (predictor_macs(16, 16), predictor_macs(9, 16))
    assert counted.dense_macs == vit_macs([17, 17, 17], 16, 64, 16, 5)
    pruned = vit_macs([17, 10, 6], 16, 64, 16, 5)
    assert counted.macs == pruned + sum(counted.predictor_macs)
    assert counted.macs_per_block[2] == 6 * (4 * 16**2 + 2 * 16 * 64) + 2 * 6 * 6 * 16
    assert counted.dense_macs_per_block == (counted.macs_per_block[0],) * 3
    assert counted.other_macs == 16 * 3 * 8 * 8 * 16 + 5 * 16


def hf_vit(attention: str) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_labels=5,
    )
    config._attn_implementation = attention
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_kind_of_attention_counts(attention: str) -> None:
    counted = profile(wrapped(hf_vit(attention)))
    assert counted.dense_macs == vit_macs([17, 17, 17], 16, 64, 16, 5)


@pytest.mark.parametrize("recipe", [STAGES, "tome-r2", "evit-k0.7", {**STAGES, "mode": "bypass"}])
def test_what_one_budget_taught_holds_for_another(recipe: Any) -> None:
    host = vit()
    host.blocks[1].register_forward_hook(
        lambda module, args, output: output.mul(1).unsqueeze_(0)[0]
    )
    model = wrapped(host, recipe)
    profiler, budget = Profiler(model), pruning_of(model).budget
    for ratio in (0.9, 0.4, 0.9, 0.6):
        ratios = tuple(ratio ** (stage + 1) for stage in range(len(budget.keep_ratios)))
        other = replace(budget, keep_ratios=ratios)
        assert profiler(other) == profile(model, budget=other)
    assert profiler(other).macs < profiler().dense_macs


def test_the_same_as_torch_counts_in_a_real_run() -> None:
    model = wrapped(hf_vit("eager")).eval()
    with FlopCounterMode(display=False) as counter:  # its hooks make this call trace again
        model(torch.randn(1, 3, 32, 32))
    assert profile(model).macs == counter.get_total_flops() // 2


def test_a_pooling_with_a_learned_query() -> None:
    host = vit(global_pool="map", class_token=False)
    assert profile(wrapped(host)).tokens_per_block == (16, 9, 5)


@pytest.mark.slow
def test_bypass_mode_counts_tokens_of_the_mlp() -> None:
    small = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    host = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(2, 4), **small
    )
    recipe = {"version": 1, "mode": "bypass", "stages": [{"block": 1, "keep_ratio": 0.5}]}
    counted = profile(wrapped(host, recipe))
    assert counted.tokens_per_block == (256, 128, 64, 64)
    assert counted.macs_per_block[0] == counted.dense_macs_per_block[0]
    assert counted.macs_per_block[1] < counted.dense_macs_per_block[1]
    assert counted.macs_per_block[2:] == counted.dense_macs_per_block[2:]


def test_with_every_token_kept_the_host_itself_runs() -> None:
    model = wrapped(vit())
    model.set_keep_ratio(1.0)
    counted = profile(model)
    assert counted.macs == counted.dense_macs
    assert counted.predictor_share == 0
    assert counted.tokens_per_block == (16, 16, 16)


def test_other_image_sizes_and_batches_are_per_image(small: Any) -> None:
    assert profile(small, torch.zeros(3, 3, 48, 48)).tokens_per_block == (36, 21, 12)
    assert profile(small, {"x": torch.zeros(3, 3, 32, 32)}) == profile(small)


def test_a_host_that_only_an_example_describes(small: Any) -> None:
    spec = tokenprune.ArchSpec(
        adapter="by hand", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=1
    )
    host = vit(num_classes=5)
    model = wrapped(host, adapter=spec, example_inputs=torch.zeros(2, 3, 32, 32))
    assert profile(model).macs == profile(small).macs


@pytest.mark.slow
def test_a_cast_model_is_counted_anew() -> None:
    model = wrapped(vit())
    before = profile(model)
    assert profile(model.to(torch.bfloat16)) == before


def test_the_dense_host_is_counted_once_until_its_weights_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wrapped(vit(num_classes=5))
    first, runs = profile(model), []
    original = counting._Count.over
    monkeypatch.setattr(
        counting._Count, "over", lambda self, *args: [runs.append(1), original(self, *args)][1]
    )
    assert profile(model) == first
    assert len(runs) == 1  # the gather path; the ratios may be others
    model.set_keep_ratio(0.3)
    assert profile(model).dense_macs == first.dense_macs
    model.head = nn.Linear(16, 7)
    assert profile(model).dense_macs == first.dense_macs + 2 * 16
    assert len(runs) == 4


def test_the_model_stays_as_it_was() -> None:
    model = wrapped(vit()).train()
    model.blocks[0].eval()
    profile(model)
    assert model.training
    assert not model.blocks[0].training


def test_the_table(small: Any) -> None:
    text = str(profile(small))
    assert text.startswith("VisionTransformer: ")
    assert "predictor 1" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert lines["blocks.2"][0] == "5"


def test_its_numbers() -> None:
    counted = Profile(
        host="Host",
        mode="remove",
        num_patches=4,
        patches_per_stage=(4,),
        num_prefix_tokens=1,
        stages=(1,),
        blocks=("a", "b"),
        tokens_per_block=(4, 2),
        macs_per_block=(4_000_000_000, 2_000_000_000),
        dense_macs_per_block=(4_000_000_000, 4_000_000_000),
        predictor_macs=(500_000_000,),
        macs=7_000_000_000,
        dense_macs=8_500_000_000,
    )
    assert (counted.gmacs, counted.dense_gmacs) == (7.0, 8.5)
    assert counted.ratio == pytest.approx(7 / 8.5)
    assert counted.predictor_share == pytest.approx(1 / 14)
    assert counted.other_macs == 500_000_000


def test_a_host_that_is_not_wrapped() -> None:
    with pytest.raises(NotWrappedError, match=r"tokenprune\.wrap"):
        profile(vit())


def test_inputs_that_do_not_fit(small: Any) -> None:
    with pytest.raises(HostError, match="refused the input"):
        profile(small, torch.zeros(1, 3, 42, 42))
    with pytest.raises(HostError, match="at least one tensor"):
        profile(small, {})


@pytest.mark.slow
def test_a_model_that_was_moved_and_trained_is_counted_as_it_was_wrapped() -> None:
    model = wrapped(vit(num_classes=5, dynamic_img_size=True))
    usual = profile(model)
    model.double().train()
    model(torch.randn(2, 3, 48, 48, dtype=torch.float64))
    assert profile(model) == usual


def test_a_host_that_takes_another_size_now_is_counted_at_that_size() -> None:
    model = wrapped(vit(num_classes=5))
    model.set_input_size(img_size=48)
    assert profile(model) == profile(model, torch.randn(1, 3, 48, 48))
    assert profile(model).num_patches == 36


def test_inference_mode_counts_the_same() -> None:
    model = wrapped(vit(num_classes=5))
    with torch.inference_mode():
        inside = profile(model), model.set_budget(macs=0.8)
    assert inside == (profile(wrapped(vit(num_classes=5))), model.set_budget(macs=0.8))
