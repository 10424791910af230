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
HALF = [0.5, 0.5, 0.5]
SETTINGS = {"image_size": 16, "in_chans": 3, "mean": HALF, "std": HALF, "crop_pct": 1.0}
SETTINGS["interpolation"] = "bilinear"
CLASSES = list("0123456789")


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
    noted = tmp_path / "model" / "input.json"  # as `train` writes it
    noted.write_text(json.dumps({"data": None, "settings": SETTINGS, "class_names": CLASSES}))
    other = str(tmp_path / "other")
    again = run("calibrate", folder, *FEW, "--trials", "7", "--output", other, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["images"] == 24
    assert pruning_of(tokenprune.load(other, build(NAME, SMALL))).recipe.mode == "merge"
    assert (tmp_path / "other" / "input.json").read_bytes() == noted.read_bytes()
    refused = run("calibrate", folder, *FEW, "--output", str(noted))
    assert refused.exit_code == 2
    assert "it is a file. Name a directory" in refused.stderr


def test_a_host_of_options_that_no_recipe_holds(tmp_path: Path) -> None:
    sizes = "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 3, num_attention_heads: 2"
    options = [f"vision_config={{{sizes}, image_size: 16, patch_size: 4}}", "num_labels=10"]
    rest = ["--images", "4", "--trials", "1", "--macs", "0.8", "--output", str(tmp_path)]
    result = run("calibrate", "transformers:SiglipForImageClassification", *options, *rest)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "calibration.json").exists()
    assert tokenprune.profile(tokenprune.load(tmp_path, verify=False)).ratio < 0.9


def test_bad_options() -> None:
    assert "one share of the dense MACs, or several" in run("compare", NAME, "--macs", "a").stderr
    result = run("compare", NAME, "--host", NAME)
    assert result.exit_code == 2
    assert "--host is for a folder" in result.stderr
