"""A host in bypass mode is trained, evaluated, saved and drawn like any other."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tokenprune.cli.visualize import draw
from tokenprune.reductions.bypass import BYPASSES
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.train import DataBundle, evaluate, fit

CLASSES = 3
RECIPE = tokenprune.Recipe.parse(
    {
        "version": 1,
        "mode": "bypass",
        "stages": [{"block": 1, "keep_ratio": 0.7}, {"block": 2, "keep_ratio": 0.5}],
        "loss": {"token_set": "all", "ratio": 10.0},
        "train": {
            "epochs": 6,
            "batch_size": 8,
            "learning_rate": 0.01,
            "backbone_lr_scale": 0.1,
            "warmup_epochs": 0,
            "frozen_epochs": 1,
        },
    }
)


def swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(3, 1), num_heads=(2, 2), window_size=4,
        num_classes=CLASSES,
    )  # fmt: skip


def bundle() -> DataBundle:
    """Images whose class is their colour."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Any:
        drawn = torch.randn(count, 3, 16, 16, generator=generator)
        items = [{"pixel_values": i, "labels": n % CLASSES} for n, i in enumerate(drawn)]
        for item in items:
            item["pixel_values"][item["labels"]] += 2
        return items

    names = ("red", "green", "blue")
    return DataBundle(train=images(24), eval=images(9), class_names=names, image_size=16)


def test_a_windowed_host_learns_and_is_drawn(tmp_path: Path) -> None:
    model = tokenprune.wrap(swin(), RECIPE, verify=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fit(RECIPE, model, bundle(), tmp_path / "run")

    logs = [entry for entry in result.history if "loss" in entry]
    assert len(logs) == RECIPE.train.epochs
    for entry in logs:
        assert all(torch.isfinite(torch.tensor(value)) for value in entry.values())
    assert logs[-1]["loss"] < logs[0]["loss"]
    asked = [0.7, 0.5]
    shares = [[entry[f"kept_share_{s}"] for s in range(2)] for entry in (logs[0], logs[-1])]
    first, last = ([abs(a - b) for a, b in zip(s, asked, strict=True)] for s in shares)
    assert sum(last) < max(sum(first), 0.1)

    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    still = {name for name, _ in model.named_parameters()} - moved
    assert not [name for name in still if name.startswith((PREDICTORS, BYPASSES))]
    assert [name for name in moved if name.startswith("layers.")]

    assert evaluate(model, bundle()) == result.metrics["accuracy"]
    saved = tokenprune.save(model, tmp_path / "saved")
    again = tokenprune.load(saved, swin(), verify=False)
    assert evaluate(again, bundle()) == result.metrics["accuracy"]

    picture = draw(model, bundle(), count=2, tile=32)
    assert picture.size == draw(again, bundle(), count=2, tile=32).size
    with torch.no_grad():
        _, trace = model.eval()(torch.zeros(2, 3, 16, 16), return_trace=True)
    assert [stage.decision.shape[1] for stage in trace.stages] == [64, 64]
    assert picture.size[0] > 3 * 32  # the image and its two stages, side by side


@pytest.mark.parametrize("start", [1, 2])
def test_every_added_parameter_gets_a_gradient_wherever_stages_start(start: int) -> None:
    recipe = {"version": 1, "mode": "bypass", "stages": [{"block": start, "keep_ratio": 0.6}]}
    model = tokenprune.wrap(swin(), recipe, verify=False).train()
    out, trace = model(torch.randn(4, 3, 16, 16), return_trace=True)
    (out.square().mean() + trace.stages[0].decision.mean()).backward()
    added = [(n, p) for n, p in model.named_parameters() if n.startswith((PREDICTORS, BYPASSES))]
    assert added
    for name, parameter in added:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
