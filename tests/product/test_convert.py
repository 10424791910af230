"""Release files of DynamicViT's authors: recognised, renamed, written, or refused with reasons."""

import argparse
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import tokenprune
import tokenprune.models
from tokenprune.checkpoints.directory import load
from tokenprune.checkpoints.dynamicvit import (
    HOSTS,
    _recipe,
    convert_dynamicvit,
    load_dynamicvit,
)
from tokenprune.checkpoints.release import Layout
from tokenprune.cli.convert import register
from tokenprune.errors import (
    CheckpointError,
    NonFiniteWeightsError,
    NotWrappedError,
    PlanError,
    TokenPruneError,
)
from tokenprune.recipe import load_recipe
from tokenprune.recipe.counting import num_keep
from tokenprune.reductions.bypass import light_branch
from tokenprune.scorers.learned import TokenPredictor

State = dict[str, Tensor]
SWIN_DEPTHS = {"swin-tiny": (2, 2, 6, 2), "swin-small": (2, 2, 18, 2), "swin-base": (2, 2, 18, 2)}


def their_names(state: Mapping[str, Tensor], host: str) -> State:
    """Our names of a wrapped model's tensors turned into the authors'."""
    swin = host.startswith("swin")
    level = "layers.2." if swin else ""
    named = {}
    for key, tensor in state.items():
        key = re.sub(
            r"^token_predictors\.(\d+)\.(in|out)_proj", rf"{level}score_predictor.\1.\2_conv", key
        )
        if swin:
            key = re.sub(
                r"^token_bypasses\.(\d+)\.",
                lambda match: f"layers.2.blocks.{int(match[1]) - 4}.fastmlp.fc1.",
                key,
            )
            key = re.sub(
                r"^layers\.(\d)\.downsample",
                lambda match: f"layers.{int(match[1]) - 1}.downsample",
                key,
            )
            key = key.replace("head.fc.", "head.")
        named[key] = tensor
    return named


def release(host: str, **options: Any) -> State:
    """A state dict in the authors' names, all zeros, and a few bytes when it is saved."""
    recipe = load_recipe(f"dynamicvit-{host}-k0.7")
    with torch.device("meta"):
        model = timm.create_model(recipe.host.model, **{**recipe.host.kwargs, **options})
    state = dict(model.state_dict())
    stages = recipe.resolved_stages
    width = model.embed_dim * (4 if host.startswith("swin") else 1)
    parts: dict[str, nn.Module] = {
        f"token_predictors.{stage}": TokenPredictor(width, device="meta")
        for stage in range(len(stages))
    }
    if host in SWIN_DEPTHS:
        for block in range(stages[0].block, sum(SWIN_DEPTHS[host][:3])):
            parts[f"token_bypasses.{block}"] = light_branch(width, device="meta")
    for path, part in parts.items():
        state |= {f"{path}.{name}": tensor for name, tensor in part.state_dict().items()}
    zeros = {key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in state.items()}
    renamed = their_names(zeros, host)
    if host in SWIN_DEPTHS:  # buffers that timm computes again
        renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
        renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return renamed


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(content: Any) -> Path:
        path = tmp_path / "release.pth"
        torch.save(content, path)
        return path

    return to_file


# Which model, and how much it keeps.


@pytest.mark.parametrize("host", sorted(HOSTS.values()))
def test_every_published_host_is_recognised(host: str, write: Callable[[Any], Path]) -> None:
    done = convert_dynamicvit(write({"model": release(host)}))
    shipped = load_recipe(f"dynamicvit-{host}-k0.7")
    assert done.host == host
    assert done.path is None
    assert done.recipe.name == shipped.name
    assert done.recipe.host == shipped.host
    assert [s.block for s in done.recipe.resolved_stages] == [
        s.block for s in shipped.resolved_stages
    ]
    assert done.recipe.loss == shipped.loss
    assert sum(name.startswith("token_predictors.") for name in done.weights) == 30
    light = {name.split(".")[1] for name in done.weights if name.startswith("token_bypasses.")}
    expected = {"swin-tiny": 5, "swin-small": 16, "swin-base": 16}
    assert len(light) == expected.get(host, 0)


def counts(recipe: Any) -> list[int]:
    return [num_keep(196, s.keep_ratio) for s in recipe.resolved_stages]


@pytest.mark.parametrize(
    ("host", "rho", "kept"),
    [
        ("deit-256", 0.9, [176, 158, 142]),
        ("deit-256", 0.8, [156, 125, 100]),
        ("deit-256", 0.7, [137, 96, 67]),
        ("deit-256", 0.5, [98, 49, 24]),
        ("deit-256", 0.6, [117, 70, 42]),  # no recipe of that ratio is shipped
        ("swin-tiny", 0.9, [176, 137, 98]),
        ("swin-tiny", 0.7, [137, 97, 58]),
    ],
)
def test_counts_are_those_of_the_authors(host: str, rho: float, kept: list[int]) -> None:
    """As measured on their code: int() of a float that may be a little below the ratio meant."""
    layout: Layout = "swin" if host in SWIN_DEPTHS else "deit"
    recipe = _recipe(host, layout, {}, rho, {})
    assert counts(recipe) == kept
    assert recipe.name == f"dynamicvit-{host}-k{rho:g}"


def test_the_ratio_comes_from_the_argument_then_the_file_then_the_papers(
    write: Callable[[Any], Path],
) -> None:
    state = release("deit-256")
    trained = argparse.Namespace(base_rate=0.9, model="deit-256", lr=1e-3)
    path = write({"model": state, "args": trained, "epoch": 29})
    assert convert_dynamicvit(path).recipe.name == "dynamicvit-deit-256-k0.9"
    assert convert_dynamicvit(path, keep_ratio=0.5).recipe.name == "dynamicvit-deit-256-k0.5"
    assert convert_dynamicvit(write({"model": state})).recipe.name == "dynamicvit-deit-256-k0.7"


@pytest.mark.parametrize("nest", ["model", "state_dict", None])
def test_wherever_the_state_dict_lies(nest: str | None, write: Callable[[Any], Path]) -> None:
    state = {f"module.{key}": tensor for key, tensor in release("deit-256").items()}
    done = convert_dynamicvit(write({nest: state} if nest else state))
    assert done.host == "deit-256"
    assert "blocks.11.norm1.weight" in done.weights


def test_other_classes_and_image_sizes(write: Callable[[Any], Path]) -> None:
    done = convert_dynamicvit(write(release("deit-256", num_classes=10, img_size=96)))
    assert done.recipe.host is not None
    assert done.recipe.host.kwargs == {
        "embed_dim": 256,
        "num_heads": 4,
        "num_classes": 10,
        "img_size": 96,
    }


# Written and loaded again.


def test_written_by_the_command_and_loaded(tmp_path: Path, write: Callable[[Any], Path]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        host = timm.create_model("deit_tiny_patch16_224", num_classes=5, img_size=32)
        model = tokenprune.wrap(host, "dynamicvit-deit-tiny-k0.5", verify=False, train=False).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = write({"model": their_names(model.state_dict(), "deit-tiny")})

    app = typer.Typer()
    register(app)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [str(path), str(out), "--keep-ratio", "0.5"])
    assert result.exit_code == 0, result.output
    assert "dynamicvit-deit-tiny-k0.5, remove; keeps 0.5 at 3, 0.25 at 6" in result.output
    assert f"model = tokenprune.load({str(out)!r})" in result.output

    again = load(out, verify=False)
    with torch.no_grad():
        expected, trace = model(images, return_trace=True)
        found, again_trace = again(images, return_trace=True)
        assert torch.equal(found, expected)
        assert [s.num_tokens for s in trace.stages] == [s.num_tokens for s in again_trace.stages]
        for parameter in again.parameters():
            parameter.zero_()
    load_dynamicvit(again, path)
    with torch.no_grad():
        assert torch.equal(again(images), expected)


# Small wrapped hosts, for what `load_dynamicvit` refuses.


@pytest.fixture(scope="module")
def small() -> Any:
    host = timm.create_model(
        "deit_tiny_patch16_224", img_size=8, patch_size=2, embed_dim=8, depth=3, num_heads=2
    )
    recipe = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}
    return tokenprune.wrap(host, recipe, verify=False, train=False)


def test_predictors_alone(small: Any, write: Callable[[Any], Path]) -> None:
    state = {key: torch.randn_like(value) for key, value in small.state_dict().items()}
    file = {k: v for k, v in their_names(state, "deit").items() if "score_predictor" in k}
    host_before = {k: v.clone() for k, v in small.state_dict().items() if k not in state}
    load_dynamicvit(small, write(file))
    for key, value in small.state_dict().items():
        if key.startswith("token_predictors."):
            assert torch.equal(value, state[key])
        else:
            assert torch.equal(value, host_before.get(key, value))
    with pytest.raises(CheckpointError, match=r"predictors but no host .* load_dynamicvit"):
        convert_dynamicvit(write(file))


def test_a_file_that_does_not_fit_lists_everything(
    small: Any, write: Callable[[Any], Path]
) -> None:
    before = {key: value.clone() for key, value in small.state_dict().items()}
    file = their_names({k: torch.zeros_like(v) for k, v in before.items()}, "deit")
    del file["norm.weight"], file["score_predictor.1.out_conv.4.bias"]
    file["blocks.3.norm1.weight"] = torch.zeros(8)
    file["head.weight"] = torch.zeros(10, 8)
    with pytest.raises(CheckpointError, match="does not fit this VisionTransformer") as caught:
        load_dynamicvit(small, write(file))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "- missing in the file (2): norm.weight, token_predictors.1.out_proj.4.bias",
        "- unexpected (1): blocks.3.norm1.weight",
        "- of another shape (1): head.weight [10, 8], not [1000, 8]",
    ]
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_only_wrapped_models_are_loaded(write: Callable[[Any], Path]) -> None:
    with pytest.raises(NotWrappedError, match="found Linear"):
        load_dynamicvit(nn.Linear(2, 2), write(release("deit-256")))


# Refused, and nothing written.


def without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


BAD: dict[str, tuple[Callable[[], Any], type[TokenPruneError], str]] = {
    "dense": (
        lambda: {k: v for k, v in release("deit-256").items() if "score" not in k},
        CheckpointError,
        "no DynamicViT checkpoint: it holds no score_predictor. Found cls_token, pos_embed",
    ),
    "convnext": (
        lambda: {"model": {"downsample_layers.0.0.weight": torch.zeros(96, 3, 4, 4)}},
        CheckpointError,
        "ConvNeXt is no transformer",
    ),
    "a key too few": (
        lambda: without(release("deit-256"), "blocks.7.mlp.fc1.weight"),
        CheckpointError,
        r"does not fit deit-256 \(dynamicvit-deit-256-k0.7\).*\n.*missing in the file \(1\): "
        "blocks.7.mlp.fc1.weight",
    ),
    "stages": (
        lambda: {
            k: v for k, v in release("deit-256").items() if not k.startswith("score_predictor.2")
        },
        CheckpointError,
        r"missing in the file \(10\): token_predictors.2.in_proj.0.bias",
    ),
    "an unpublished size": (
        lambda: {k: v for k, v in release("deit-256").items() if "blocks.11" not in k},
        CheckpointError,
        r"layout of deit with 256 channels and 11 blocks; no published model .*deit-small: 384 "
        "channels, 12 blocks.*load_dynamicvit",
    ),
    "a branch of another model": (
        lambda: release("swin-tiny") | {"layers.2.blocks.0.fastmlp.fc1.0.weight": torch.zeros(384)},
        CheckpointError,
        r"unexpected \(1\): token_bypasses.4.0.weight",
    ),
    "nan": (
        lambda: release("deit-256") | {"norm.bias": torch.full((256,), float("nan"))},
        NonFiniteWeightsError,
        "holds NaN or inf in norm.bias",
    ),
    "no state dict": (
        lambda: {"epoch": 3, "best": 0.1},
        CheckpointError,
        "holds no state dict.*found a mapping with 'epoch', 'best'",
    ),
    "a list": (lambda: [1, 2], CheckpointError, "holds no state dict.*found a list"),
    "numbers among tensors": (
        lambda: {"model": {"cls_token": 3}},
        CheckpointError,
        "holds no state dict",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, write: Callable[[Any], Path]) -> None:
    make, error, message = BAD[name]
    path = write(make())
    with pytest.raises(error, match=message):
        convert_dynamicvit(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_ratio_that_leaves_nothing(write: Callable[[Any], Path]) -> None:
    with pytest.raises(PlanError, match=r"keep_ratio 0.4 gives stages of \[0.4, 0.2, 0.0\]"):
        convert_dynamicvit(write(release("swin-tiny")), keep_ratio=0.4)


class Code:
    """What a pickle can hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": {"cls_token": torch.zeros(2)}, "args": Code()}
    torch.save(content, "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"weights_only=True\): it asks for '\w+\.system'.*run code"
    ):
        convert_dynamicvit("bad.pth", "out")
    Path("plain.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(CheckpointError, match=r"weights_only=True.*run code"):
        convert_dynamicvit("plain.pth", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "plain.pth"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_off_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(release("deit-256"), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.7, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match=r"cut\.pth.*(fetch it again)"):
            convert_dynamicvit(path, tmp_path / "out")
    path.write_text("no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"cut\.pth.*(fetch it again)"):
        convert_dynamicvit(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file"):
        convert_dynamicvit(tmp_path / "nothing.pth")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"it is a file\. Name a directory"):
        convert_dynamicvit(tmp_path / "nothing.pth", tmp_path / "file")
