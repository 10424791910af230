"""What the public DynamicViT code answered, against ours: see tests/data/dynamicvit/README.md."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.checkpoints.dynamicvit import load_dynamicvit
from tokenprune.checkpoints.release import read_release
from tokenprune.losses import PruningLoss
from tokenprune.models import LVViT

DATA = Path(__file__).parents[1] / "data" / "dynamicvit"
REMOVE = {"version": 1, "schedule": {"blocks": [1, 2, 3], "keep_ratio": 0.7}}
# 97 of 196 tokens at the second stage: their 0.7 - 0.2 is a little below 0.5
BYPASS = {
    "version": 1,
    "mode": "bypass",
    "stages": [
        {"block": 3, "keep_ratio": 0.7},
        {"block": 4, "keep_ratio": 0.495},
        {"block": 5, "keep_ratio": 0.3},
    ],
}
PLAIN = {"img_size": 28, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}


def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", num_classes=5, **PLAIN)


def lvvit() -> nn.Module:
    return LVViT(num_classes=5, **PLAIN)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        patch_size=1,
        embed_dim=4,
        depths=(1, 1, 4, 1),
        num_heads=(1, 1, 2, 2),
        num_classes=5,
        drop_path_rate=0.0,
    )


def read(name: str) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(DATA / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "make", "recipe"),
    [("deit", deit, REMOVE), ("lvvit", lvvit, REMOVE), ("swin", swin, BYPASS)],
)
def test_eval_is_theirs(name: str, make: Callable[[], nn.Module], recipe: dict[str, Any]) -> None:
    model = tokenprune.wrap(make(), recipe, verify=False).eval()
    load_dynamicvit(model, DATA / f"{name}.pt")
    case = read(name)["case"]
    images = case["images"].float()
    for batch in (1, 2, 3):  # their Swin fails at 2; ours must not
        with torch.no_grad():
            logits, trace = model(images[:batch], return_trace=True)
        for stage, kept in zip(trace.stages, case["keep_indices"], strict=True):
            assert torch.equal(stage.keep_indices, kept[:batch].long())
        torch.testing.assert_close(logits, case["logits"][:batch], rtol=0.0, atol=1e-5)


def test_a_training_step_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions, loss parts and gradients of the predictors, with the noise that they drew."""
    content = read("deit-train")
    case = content["case"]
    images = case["images"].double()
    teacher = deit().double().eval()
    teacher.load_state_dict(content["teacher"])
    with torch.no_grad():
        tokens = teacher.forward_features(images)
        teacher_logits, teacher_tokens = teacher.forward_head(tokens), tokens[:, 1:]

    model = tokenprune.wrap(deit().double(), REMOVE, verify=False).train()
    load_dynamicvit(model, DATA / "deit-train.pt")
    drawn = iter(case["noise"])

    def rand(shape: torch.Size, **options: Any) -> Tensor:
        noise = next(drawn).to(options["dtype"])
        assert noise.shape == shape
        return torch.exp(-noise)  # -log(u) is exponential

    monkeypatch.setattr("tokenprune.ops.gumbel.torch.rand", rand)
    logits, trace = model(images, return_trace=True)
    loss, parts = PruningLoss(keep_ratios=(0.7, 0.49, 0.343))(
        logits,
        case["labels"],
        [stage.decision for stage in trace.stages],
        teacher_logits=teacher_logits,
        student_tokens=trace.patch_tokens,
        teacher_tokens=teacher_tokens,
    )
    for stage, kept in zip(trace.stages, case["kept"], strict=True):
        assert torch.equal(stage.decision > 0.5, kept)
    assert parts.keys() == case["parts"].keys()
    for name, value in case["parts"].items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-6, atol=0.0)

    loss.backward()
    assert len(case["gradients"]) == 30
    for name, theirs in case["gradients"].items():
        ours = name.replace("score_predictor", "token_predictors").replace("_conv", "_proj")
        found = model.get_parameter(ours).grad
        assert (found - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_their_arguments_are_read() -> None:
    weights, rho = read_release(DATA / "deit.pt")
    assert rho == 0.7
    assert "score_predictor.2.out_conv.4.bias" in weights
