"""What each error says. Every class of `tokenprune.errors` is here once.

That a host which was refused stays as it was is in `test_bad_input.py`.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune import errors
from tokenprune.hosts.registry import describe
from tokenprune.scorers import SCORERS

RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}
IMAGES = torch.zeros(2, 3, 32, 32)


def vit(**changes: Any) -> nn.Module:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**{**shape, **changes}).eval()


@cache
def _wrapped() -> Any:
    return tokenprune.wrap(vit(), RECIPE, verify=False, train=False).eval()


def wrapped() -> Any:
    return copy.deepcopy(_wrapped())


def with_recipe(**changes: Any) -> Callable[[], Any]:
    return lambda: tokenprune.wrap(vit(), {**RECIPE, **changes})


class Convolving(nn.Module):
    """A block that mixes neighbouring tokens by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(x)


class TokensFirst(nn.Module):
    """A block whose softmax runs over tokens in dim 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.transpose(0, 1).softmax(0).transpose(0, 1)


class AsksForAValue(nn.Module):
    """A block that decides by a tensor's value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def stack(block: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    spec = tokenprune.ArchSpec(
        adapter="here", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=1
    )
    tokens = torch.randn(2, 9, 8)
    return tokenprune.wrap(Stack(block), RECIPE, example_inputs=tokens, adapter=spec)


def nan_weights() -> Any:
    host = vit()
    with torch.no_grad():
        host.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    return tokenprune.wrap(host, RECIPE)


def missing_library() -> None:
    raise errors.MissingDependencyError("The demo needs x. Run: pip install 'tokenprune-torch[x]'")


def forced(*sets: list[list[int]]) -> Callable[[], Any]:
    def call() -> Any:
        model = wrapped()
        with model.using(keep_indices=[torch.tensor(kept) for kept in sets]):
            return model(IMAGES)

    return call


CASES: list[tuple[type[Exception], type[Exception], Callable[[], Any], str]] = [
    (
        errors.UnknownRecipeError,
        LookupError,
        lambda: tokenprune.wrap(vit(), "dynamicvit-deit-smal-k0.7"),
        "dynamicvit-deit-small-k0.7",
    ),
    (errors.RecipeError, ValueError, with_recipe(schedul={}), "schedul"),
    (
        errors.RecipeError,
        ValueError,
        with_recipe(schedule={"blocks": [1], "keep_ratio": 1.5}),
        "schedule.keep_ratio",
    ),
    (
        errors.PlanError,
        ValueError,
        with_recipe(schedule={"blocks": [1, 7], "keep_ratio": 0.7}),
        r"at blocks \[7\], but the host has 3 blocks \(0 to 2\)",
    ),
    (
        errors.PlanError,
        ValueError,
        lambda: wrapped().set_keep_ratio([0.5, 0.7]),
        "must not grow from stage to stage",
    ),
    (errors.PlanError, ValueError, lambda: wrapped().set_keep_ratio(0.0), r"must lie in \(0, 1\]"),
    (
        errors.PlanError,
        ValueError,
        lambda: wrapped().set_keep_ratio([0.5]),
        "1 ratios, but the plan has 2 stages",
    ),
    (
        errors.RegistrationError,
        ValueError,
        lambda: SCORERS.register("random")(object),
        "A scorer named 'random' is registered already.*replace=True",
    ),
    (
        errors.AlreadyWrappedError,
        ValueError,
        lambda: tokenprune.wrap(wrapped(), RECIPE),
        "wrapped already.*unwrap",
    ),
    (
        errors.NotWrappedError,
        ValueError,
        lambda: tokenprune.unwrap(vit()),
        "found VisionTransformer.*wrap",
    ),
    (
        errors.UnsupportedHostError,
        ValueError,
        lambda: tokenprune.wrap(timm.create_model("resnet50"), RECIPE),
        "No transformer block is found in ResNet: .*adapter=ArchSpec",
    ),
    (
        errors.TraceError,
        ValueError,
        lambda: stack(AsksForAValue),
        "cannot be traced.*test_errors.py.*if x.sum",
    ),
    (
        errors.TokensReturnedError,
        ValueError,
        lambda: tokenprune.wrap(vit(num_classes=0, global_pool=""), RECIPE),
        "output holds tokens after a stage.*restore=True",
    ),
    (errors.LeakError, ValueError, lambda: stack(TokensFirst), "first dim is not the batch"),
    (
        errors.VerificationError,
        RuntimeError,
        lambda: stack(Convolving),
        r"first at node 'blocks_1_conv'.*test_errors.py.*self.conv",
    ),
    (
        errors.HostError,
        ValueError,
        lambda: wrapped()(torch.zeros(2, 3, 30, 32)),
        "refused the input.*doesn't match model",
    ),
    (errors.HostError, ValueError, lambda: wrapped()(IMAGES, wrong=1), r"takes \(x.*called with"),
    (errors.NonFiniteWeightsError, ValueError, nan_weights, "'blocks.1.mlp.fc1.weight'.*1 values"),
    (errors.KeepIndicesError, ValueError, forced([[0, 16]] * 2, [[0]] * 2), "16"),
    (errors.KeepIndicesError, ValueError, forced([[3, 3]] * 2, [[3]] * 2), "3"),
    (
        errors.KeepIndicesError,
        ValueError,
        forced([[0, 1]] * 2, [[2]] * 2),
        r"\[2\] of image 0, which stage 0 dropped",
    ),
    (errors.KeepIndicesError, ValueError, forced([[0, 1]] * 2), "1 stages; the plan has 2"),
    (
        errors.CheckpointError,
        RuntimeError,
        lambda: tokenprune.load("no/such/folder", vit()),
        "no/such/folder",
    ),
    (
        errors.ExportError,
        RuntimeError,
        lambda: tokenprune.export(wrapped(), "model.bin"),
        "exported as 'onnx' or 'pt2', found 'model.bin'",
    ),
    (
        errors.AdapterError,
        ValueError,
        lambda: tokenprune.register_adapter(object()),
        "is no adapter",
    ),
    (
        errors.UnknownAdapterError,
        LookupError,
        lambda: describe(vit(), "timm/vision_transforme"),
        "timm/vision_transformer",
    ),
    (errors.MissingDependencyError, ImportError, missing_library, "pip install"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_the_message_says_what_was_found(
    case: tuple[type[Exception], type[Exception], Callable[[], Any], str],
) -> None:
    kind, builtin, call, words = case
    with pytest.raises(kind, match=f"(?s){words}") as caught:
        call()
    assert isinstance(caught.value, errors.TokenPruneError)
    assert isinstance(caught.value, builtin)


def test_every_error_class_is_tested_and_documented() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.TokenPruneError)
    } - {"TokenPruneError"}
    assert classes == {case[0].__name__ for case in CASES}
    assert classes | {"TokenPruneError", "TokenPruneWarning", "did_you_mean"} >= set(errors.__all__)
    page = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
    assert not [name for name in classes if f"## {name}" not in page]
