"""train, eval, visualize and demo, from the command line to the files they write."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import tokenprune
from tokenprune.cli.app import app
from tokenprune.cli.runs import keep_ratios
from tokenprune.errors import PlanError
from tokenprune.train import pretraining

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
RECIPE = """
version: 1
name: tiny
schedule: {blocks: [1, 2], keep_ratio: 0.6}
train:
  epochs: 1
  batch_size: 8
  image_size: 16
  warmup_epochs: 0
  frozen_epochs: 0
  backbone_lr_scale: 0.5
"""
HOST = f"""
host:
  library: timm
  model: vit_tiny_patch16_224
  kwargs: {json.dumps(VIT)}
"""
HF = ["num_hidden_layers=3", "hidden_size=16", "intermediate_size=32", "num_attention_heads=2"]
HF += ["patch_size=4"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})


def options(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--option", text)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(RECIPE + HOST)
    return file


def draw_images(root: Path, *names: str, count: int = 10) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"), "cat", "dog")


@pytest.fixture(scope="module")
def trained(recipe: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one call of `tokenprune train` writes."""
    folder = tmp_path_factory.mktemp("run")
    result = run("train", recipe, "--data", images, "--output", folder, "--scratch")
    assert result.exit_code == 0, result.output
    assert "4 held-out images" in result.stdout
    assert f"tokenprune visualize {folder}" in result.stdout
    return folder


def test_train_writes_a_checkpoint(trained: Path) -> None:
    host = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT)
    model = tokenprune.load(trained, host, verify=False)
    said = tokenprune.Recipe.load(trained / "recipe.yaml").host
    assert said is not None
    assert said.kwargs == {**VIT, "img_size": [16, 16], "num_classes": 2, "in_chans": 3}
    assert type(tokenprune.load(trained, verify=False)) is type(model)
    assert tokenprune.profile(model).tokens_per_block == (16, 9, 5)
    noted = json.loads((trained / "input.json").read_text())
    assert noted["class_names"] == ["cat", "dog"]
    assert noted["settings"]["image_size"] == 16


def test_train_resumes(trained: Path, recipe: Path, images: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    result = run("train", recipe, "--data", images, "--output", trained, "--scratch")
    assert result.exit_code == 0, result.output
    assert (trained / "model.safetensors").read_bytes() == before  # nothing was left to do


def test_another_run_is_not_resumed(trained: Path, recipe: Path, images: Path) -> None:
    rest = ("--scratch", "--epochs", "2")
    result = run("train", recipe, "--data", images, "--output", trained, *rest)
    assert result.exit_code == 2
    assert "holds another run, which cannot be resumed" in result.stderr


def test_eval(trained: Path) -> None:
    result = run("eval", trained)
    assert result.exit_code == 0, result.output
    assert "4 held-out images" in result.stdout
    assert "nothing pruned" in result.stdout
    assert "pruned (gather)" in result.stdout
    assert "pruned (mask)" not in result.stdout


def gmacs(output: str, path: str) -> float:
    line = next(line for line in output.splitlines() if path in line)
    return float(line.split()[-1])


def test_eval_by_another_ratio_and_path(trained: Path) -> None:
    found = json.loads(run("eval", trained, "--path", "gather", "--json").stdout)
    assert [path["path"] for path in found["paths"]] == ["gather"]
    usual = found["paths"][0]["gmacs"]
    result = run("eval", trained, "--path", "gather", "--keep-ratio", "0.5,0.1")
    assert result.exit_code == 0, result.output
    assert "nothing pruned" not in result.stdout
    assert gmacs(result.stdout, "pruned (gather)") < usual


def test_eval_by_a_threshold_counts_what_its_images_cost(trained: Path) -> None:
    """At a threshold that all tokens pass, and at one that none passes: one token is left."""
    paths = ("--path", "gather", "--path", "dense")
    everything = run("eval", trained, *paths, "--threshold", "0.000001").stdout
    dense = gmacs(everything, "nothing pruned")
    assert gmacs(everything, "pruned (gather)") > dense  # the predictors
    assert gmacs(everything, "pruned (gather)") == pytest.approx(dense, rel=0.1)
    nothing = run("eval", trained, *paths, "--threshold", "0.999999").stdout
    fewest = run("eval", trained, *paths, "--keep-ratio", "0.01").stdout
    assert gmacs(nothing, "pruned (gather)") == gmacs(fewest, "pruned (gather)") < dense
    cost = gmacs(nothing, "pruned (gather)")
    assert f"mean of images that cost {cost} to {cost} GMACs" in nothing


def test_a_ratio_and_a_threshold_are_one_too_many(trained: Path) -> None:
    for command in ("eval", "visualize"):
        result = run(command, trained, "--threshold", "0.5", "--keep-ratio", "0.5")
        assert result.exit_code == 2
        assert "Give one of them." in result.stderr
        result = run(command, trained, "--threshold", "1.5")
        assert result.exit_code == 2
        assert "asked for threshold=1.5" in result.stderr


def test_visualize(trained: Path, tmp_path: Path) -> None:
    result = run("visualize", trained, "--count", "3", "--tile", "64")
    assert result.exit_code == 0, result.output
    assert f"picture   {trained / 'pruning.png'}" in result.stdout
    with Image.open(trained / "pruning.png") as picture:
        assert picture.size == (6 + 3 * 70, 34 + 6 + 3 * 84)
    other = tmp_path / "deep" / "x.png"
    assert run("visualize", trained, "--output", other, "--count", "99").exit_code == 0
    assert other.exists()
    refused = run("visualize", trained, "--recipe", "merge-k0.7", "--output", other)
    assert refused.exit_code == 2
    assert "--recipe is for building a model by name" in refused.stderr


def test_other_classes_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = draw_images(tmp_path, "cat", "cow", count=3)
    result = run("eval", trained, "--data", folder)
    assert result.exit_code == 2
    assert "knows the classes cat, dog (2)" in result.stderr
    assert "cat, cow (2)" in result.stderr


def test_a_transformers_host_by_its_type(recipe: Path, images: Path, tmp_path: Path) -> None:
    rest = ("--scratch", "--model", "transformers:vit", *options(HF))
    result = run("train", recipe, "--data", images, "--output", tmp_path / "run", *rest)
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "run" / "tokenprune.json").read_text())
    assert saved["host"]["class"].endswith("ViTForImageClassification")
    assert run("eval", tmp_path / "run").exit_code == 0


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_start_from_weights_of_the_dense_host(
    ending: str, recipe: Path, images: Path, tmp_path: Path
) -> None:
    host = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT)
    file = tmp_path / f"dense{ending}"
    if ending == ".pth":
        torch.save({"model": host.state_dict()}, file)
    else:
        save_file(host.state_dict(), file)
    frozen = tmp_path / "frozen.yaml"
    frozen.write_text(recipe.read_text().replace("backbone_lr_scale: 0.5", "backbone_lr_scale: 0"))
    output = tmp_path / "run"
    result = run(
        "train", frozen, "--data", images, "--output", output, "--host-weights", file
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=2, **VIT)
    loaded = tokenprune.unwrap(tokenprune.load(output, fresh, verify=False))
    assert torch.equal(loaded.state_dict()["head.weight"], host.state_dict()["head.weight"])


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "There is no file"),
        ("text", "Cannot read"),
        ("pickle", "Cannot read"),
        ("list", "Cannot read"),
        ("other", "does not fit VisionTransformer"),
    ],
)
def test_weights_that_are_none(
    what: str, message: str, recipe: Path, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "w.pth"
    if what == "text":
        file = tmp_path / "w.safetensors"
        file.write_text("hello")
    elif what == "pickle":
        torch.save({"model": Evil()}, file)
    elif what == "list":
        torch.save([1, 2], file)
    elif what == "other":
        torch.save({"head.weight": torch.zeros(3, 3)}, file)
    rest = ("--output", tmp_path / "run", "--host-weights", file)
    result = run("train", recipe, "--data", images, *rest)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "this ran" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dynamicvit-deit-small-k0.6"], "No recipe is named 'dynamicvit-deit-small-k0.6'"),
        (["RECIPE", "--data", "nowhere"], "The image folder 'nowhere' does not exist"),
        (["RECIPE", "--option", "depth=3"], "name it with --model"),
        (["RECIPE", "--model", "torch:x"], "Models come from timm or transformers"),
        (["RECIPE", "--model", "vit_tny"], "timm has no model named 'vit_tny'"),
        (["RECIPE", "--epochs", "0", "--data", "IMAGES"], "epochs"),
    ],
)
def test_what_train_refuses(
    arguments: list[str], message: str, recipe: Path, images: Path, tmp_path: Path
) -> None:
    known = {"RECIPE": recipe, "IMAGES": images}
    given = [known.get(argument, argument) for argument in arguments]
    result = run("train", *given, "--scratch", "--output", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_recipe_without_a_host(images: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = run("train", tmp_path / "r.yaml", "--data", images)
    assert result.exit_code == 2
    assert "'tiny' names no host to build. Give one with --model" in result.stderr


def test_missing_weights_say_how_else_to_start(
    recipe: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", unreachable)
    result = run("train", recipe, "--data", images)
    assert result.exit_code == 2
    assert "no network" in result.stderr
    assert "--dense-epochs N" in result.stderr


@pytest.mark.parametrize("command", ["eval", "visualize"])
def test_what_is_no_checkpoint(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path)
    assert result.exit_code == 2
    assert "is no checkpoint: it lacks tokenprune.json" in result.stderr


def test_what_eval_refuses(trained: Path, tmp_path: Path) -> None:
    result = run("eval", trained, "--path", "gathered")
    assert result.exit_code == 2
    assert "There is no path 'gathered'. Choose among dense, mask, gather" in result.stderr
    kept = (trained / "input.json").read_text()
    (trained / "input.json").write_text(kept[:20])
    result = run("eval", trained)
    (trained / "input.json").write_text(kept)
    assert result.exit_code == 2
    assert "input.json' is damaged" in result.stderr


def test_keep_ratios() -> None:
    assert keep_ratios("0.7") == 0.7
    assert keep_ratios("0.7, 0.5") == [0.7, 0.5]
    with pytest.raises(PlanError, match="found 'much'"):
        keep_ratios("much")


@pytest.mark.slow
def test_the_demo(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    batch = tmp_path / "r.yaml"
    batch.write_text(recipe.read_text().replace("batch_size: 8", "batch_size: 256"))
    rest = ("--dense-epochs", "1", "--rounds", "1", "--recipe", batch)
    result = run("demo", "--output", output, *rest)
    assert result.exit_code == 0, result.output
    found = json.loads((output / "figures.json").read_text())
    assert found["held_out_images"] == 360
    assert found["patch_tokens"] == {"before": [16, 16], "kept": [9, 5]}
    assert found["gmacs"]["pruned"] < found["gmacs"]["dense"]
    rates = found["images_per_second"]["64"]
    assert rates["speedup"] == pytest.approx(rates["pruned"] / rates["dense"])
    for name in ("pruned", "dense"):
        share = found["accuracy"][name]
        shown = f"{100 * share:.2f} % ({round(360 * share)} of 360)"
        assert shown in result.stdout
        assert shown in (output / "report.html").read_text()
    assert "16 -> 9 -> 5" in result.stdout
    for name in ("pruning.png", "report.html", "figures.json", "checkpoint"):
        assert str(output / name) in result.stdout
        assert (output / name).exists()
    assert run("eval", output / "checkpoint").exit_code == 0


def test_eval_on_other_images_takes_all_of_them(trained: Path, tmp_path: Path) -> None:
    others = draw_images(tmp_path / "others", "cat", "dog", count=7)
    assert "14 held-out images of others" in run("eval", trained, "--data", others).stdout


def test_a_checkpoint_that_knows_no_images(trained: Path, images: Path, tmp_path: Path) -> None:
    """What `tokenprune.save` and `convert` write: the published normalisation, and a note."""
    bare = tmp_path / "bare"
    shutil.copytree(trained, bare)
    (bare / "input.json").unlink()
    result = run("eval", bare)
    assert result.exit_code == 2
    assert "does not say on which images it was trained" in result.stderr
    result = run("eval", bare, "--data", images)
    assert result.exit_code == 0, result.output
    assert "20 held-out images" in result.stdout
    assert "prepared as for the host's published weights" in result.stderr


def test_dense_epochs_are_trained_unless_there_is_a_whole_checkpoint(
    recipe: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed while it wrote its first checkpoint starts from the trained host."""
    calls: list[int] = []
    pretrain = pretraining.pretrain

    def counted(host: Any, data: Any, epochs: int, **rest: Any) -> Any:
        calls.append(epochs)
        return pretrain(host, data, epochs, **rest)

    monkeypatch.setattr(pretraining, "pretrain", counted)
    line = ("train", recipe, "--data", images, "--output", tmp_path / "run", "--dense-epochs", "1")
    for _ in range(2):
        assert run(*line).exit_code == 0
        assert calls == [1]
    for mark in (tmp_path / "run").glob("checkpoint-*/whole"):
        mark.unlink()
    (dense,) = (tmp_path / "run" / "dense").glob("checkpoint-*/model.safetensors")
    written = dense.stat().st_mtime_ns
    assert run(*line).exit_code == 0
    assert calls == [1, 1]
    assert dense.stat().st_mtime_ns == written


def test_faults_are_found_before_the_dense_host_is_trained(
    recipe: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "pretrain", None)
    line = ("train", recipe, "--data", images, "--output", tmp_path / "r", "--dense-epochs", "1")
    assert "train.epochs" in run(*line, "--epochs", "0").stderr
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("[1, 2]", "[1, 7]") + HOST)
    assert "prunes at blocks [7]" in run("train", other, *line[2:]).stderr
