"""`tokenprune compare` and `tokenprune calibrate`."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import tokenprune
from tokenprune.cli.app import app
from tokenprune.cli.hosts import build
from tokenprune.runtime.model import pruning_of

NAME = "vit_tiny_patch16_224"
SMALL = ["depth=4", "embed_dim=32", "num_heads=2", "img_size=16", "patch_size=2", "num_classes=10"]
HOST = [NAME, *SMALL]
UNTIMED = ["--no-timed", "--json"]
FEW = ["--images", "24", "--batch-size", "12"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140"})


def test_methods_are_compared_on_images(tmp_path: Path) -> None:
    picture = tmp_path / "costs.png"
    methods = ["--method", "merge-k0.7", "--method", "random-k0.5"]
    result = run("compare", *HOST, *FEW, *methods, "--macs", "0.8,0.6", "--output", str(picture))
    assert result.exit_code == 0, result.output
    assert "24 images, dense accuracy" in result.stdout  # ten classes, as the digits have
    assert result.stdout.count("merge-k0.7") >= 2
    assert "Least is lost at 0.6 of the MACs by" in result.stdout
    assert "model.set_budget(0.6)" in result.stdout
    assert picture.stat().st_size > 1000
    other = [*HOST[:-1], "num_classes=4"]
    result = run("compare", *other, *FEW, "--method", "merge-k0.7", "--macs", "0.7", *UNTIMED)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["dense_accuracy"] is None  # the images have other classes
    assert found["rows"][0]["method"] == "merge-k0.7"
    assert "model.set_budget(0.7)" in found["advice"]["0.7"]


def test_a_calibrated_model_is_saved_and_opened(tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    result = run("calibrate", *HOST, *FEW, "--macs", "0.6", "--trials", "7", "--output", folder)
    assert result.exit_code == 0, result.output
    assert "calibrated on 24 images" in result.stdout
    loaded = tokenprune.load(folder, build(NAME, SMALL))
    assert abs(tokenprune.profile(loaded).ratio - 0.6) < 0.02
    opened = run("compare", folder, *FEW, "--data", "digits", "--method", "tome-r3", "--no-timed")
    assert opened.exit_code == 0, opened.output
    assert "this model" in opened.stdout
    rest = ["--data", "digits", "--trials", "7", "--output", folder, "--json"]
    again = run("calibrate", folder, *FEW, *rest)
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["images"] == 24
    assert pruning_of(tokenprune.load(folder, build(NAME, SMALL))).recipe.mode == "merge"


def test_bad_options() -> None:
    assert "one share of the dense MACs, or several" in run("compare", NAME, "--macs", "a").stderr
    result = run("compare", NAME, "--host", NAME)
    assert result.exit_code == 2
    assert "--host is for a folder" in result.stderr
