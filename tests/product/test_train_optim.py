"""Rates by step and parameter, the weight average, and mixed batches."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokenprune
from tokenprune.errors import CheckpointError
from tokenprune.recipe.schema import TrainSection
from tokenprune.train.average import WeightAverage
from tokenprune.train.mixing import Mixing, criterion
from tokenprune.train.optim import (
    Schedule,
    frozen_names,
    make_optimizer,
    make_scheduler,
    parameter_groups,
)

CONFIG = TrainSection(
    epochs=30, learning_rate=0.2, min_learning_rate=0.02, backbone_lr_scale=0.1, warmup_epochs=5
)


@pytest.fixture
def model() -> nn.Module:
    host = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2
    )
    recipe = {"version": 1, "schedule": {"blocks": [1], "keep_ratio": 0.5}}
    return tokenprune.wrap(host, recipe, verify=False)


def test_schedule_of_a_long_run() -> None:
    schedule = Schedule.of(CONFIG, total=300)
    assert (schedule.warmup, schedule.frozen) == (50, 50)
    assert [schedule.new(step) for step in (0, 24, 49, 50)] == pytest.approx([0.02, 0.5, 1, 1])
    assert schedule.new(175) == pytest.approx(0.55)
    assert schedule.new(300) == pytest.approx(0.1)
    assert [schedule.host(step) for step in (0, 49)] == [0, 0]
    assert schedule.host(50) == schedule.new(50)


@given(
    total=st.integers(1, 500),
    epochs=st.integers(1, 40),
    warmup=st.integers(0, 50),
    frozen=st.integers(0, 50),
)
def test_every_run_warms_up_moves_the_host_and_comes_down(
    total: int, epochs: int, warmup: int, frozen: int
) -> None:
    config = TrainSection(epochs=epochs, warmup_epochs=warmup, frozen_epochs=frozen)
    schedule = Schedule.of(config, total)
    factors = [schedule.new(step) for step in range(total)]
    peak = max(schedule.warmup - 1, 0)
    assert factors[peak] == pytest.approx(1)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(schedule.warmup, schedule.frozen) <= math.ceil(total / 4)
    assert schedule.host(total - 1) > 0 or total < 3


def test_groups_tell_new_parameters_from_the_hosts_and_decay_matrices_only(model: Any) -> None:
    groups = {group["name"]: group for group in parameter_groups(model, CONFIG)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {label: {names[id(p)] for p in group["params"]} for label, group in groups.items()}

    assert sum(len(group) for group in found.values()) == len(names)
    assert groups["new"]["lr"] == 0.2
    assert groups["host"]["lr"] == pytest.approx(0.02)
    assert groups["host"]["weight_decay"] == CONFIG.weight_decay
    assert groups["host without decay"]["weight_decay"] == 0
    assert "token_predictors.0.in_proj.1.weight" in found["new"]
    assert "token_predictors.0.in_proj.1.bias" in found["new without decay"]
    assert "blocks.0.attn.qkv.weight" in found["host"]
    # matrices in shape, but the host says no
    assert {"cls_token", "pos_embed", "norm.weight"} <= found["host without decay"]
    assert model.no_weight_decay() & set(names.values()) <= found["host without decay"]


def test_frozen_parameters_by_part_of_their_name(model: Any) -> None:
    assert frozen_names(model, ["cls_token", "patch_embed"]) == {
        "cls_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    # predictors are not the host's, whatever their names hold
    assert all("predictors" not in name for name in frozen_names(model, ["proj"]))
    with pytest.warns(UserWarning, match="'position_embeddings', which is part of no parameter"):
        assert frozen_names(model, ["position_embeddings"]) == set()


def test_the_host_stands_still_while_it_is_frozen(model: Any) -> None:
    optimizer = make_optimizer(model, CONFIG)
    scheduler = make_scheduler(optimizer, Schedule(total=4, warmup=0, frozen=2, floor=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def moved() -> set[bool]:
        changed = {
            name.startswith("token_predictors"): not torch.equal(p, before[name])
            for name, p in model.named_parameters()
        }
        return {new for new, differs in changed.items() if differs}

    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        assert moved() == ({True} if step < 2 else {True, False})


def test_average_follows_the_weights_and_comes_back_from_a_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(net, decay=0.5)
    expected = net[0].weight.detach().clone()
    for step in range(1, 9):
        with torch.no_grad():
            net[0].weight.add_(1)
            net[1].running_mean.add_(1)
        average.update(net)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    assert torch.allclose(average.average["0.weight"], expected)
    assert 0 < average.average["1.running_mean"][0] < 8

    average.save(tmp_path / "a.safetensors")
    again = WeightAverage(net, decay=0.5)
    again.load(tmp_path / "a.safetensors")
    assert again.steps == 8
    assert all(torch.equal(again.average[n], t) for n, t in average.average.items())

    trained = net[0].weight.detach().clone()
    with average.inside(net):
        assert torch.equal(net[0].weight, average.average["0.weight"])
    assert torch.equal(net[0].weight, trained)
    with pytest.raises(CheckpointError, match=r"average of another model: \['0\.bias'"):
        WeightAverage(nn.Linear(2, 2), 0.5).load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_mixed_targets_say_how_much_of_each_image_there_is(batch: int) -> None:
    mixing = Mixing(TrainSection(mixup=1.0, label_smoothing=0.1), num_classes=3)
    images = torch.zeros(batch, 3, 4, 4)
    images[0] = 1
    labels = torch.arange(batch) % 3
    given_images = images.clone()
    np.random.seed(0)
    mixed, targets = mixing(images, labels)
    assert torch.equal(images, given_images)
    assert mixed.shape == images.shape
    assert targets.sum(1) == pytest.approx(torch.ones(batch))

    plain = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
    if batch % 2:
        assert torch.equal(mixed[-1], images[-1])
        assert torch.allclose(targets[-1], plain[-1])
    if batch > 1:
        share = mixed[0, 0, 0, 0]
        pairs = batch // 2 * 2
        expected = share * plain[0] + (1 - share) * plain[pairs - 1]
        assert torch.allclose(targets[0], expected, atol=1e-6)


def test_labels_are_smoothed_once() -> None:
    logits, labels = torch.randn(4, 3), torch.arange(4) % 3
    smooth = TrainSection(label_smoothing=0.2)
    _, target = Mixing(smooth, 3)(torch.zeros(4, 3, 2, 2), labels)
    assert target is labels
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.equal(criterion(smooth)(logits, target), expected)
    assert criterion(TrainSection(label_smoothing=0.2, cutmix=1.0)) is F.cross_entropy
    assert criterion(TrainSection()) is F.cross_entropy


def test_light_branches_are_new_too() -> None:
    """They start at random like the predictors, and follow the predictors' rate."""
    host = timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2
    )
    recipe = {"version": 1, "mode": "bypass", "schedule": {"blocks": [1], "keep_ratio": 0.5}}
    model = tokenprune.wrap(host, recipe, verify=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, CONFIG)
    new = {names[id(p)] for g in groups if g["name"].startswith("new") for p in g["params"]}
    added = ("token_predictors", "token_bypasses")
    assert new == {name for name in names.values() if name.startswith(added)}
    assert any(name.startswith("token_bypasses") for name in new)
