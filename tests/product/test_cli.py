"""The command line: what it prints, its exit codes, and its messages."""

import errno
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import tokenprune
from tokenprune.cli import console, main
from tokenprune.cli.app import app
from tokenprune.cli.hosts import host_section, parse_options, recipe_for, split_name
from tokenprune.errors import HostError

ROOT = Path(__file__).parents[2]
SMALL_VIT = ["depth=4", "embed_dim=32", "num_heads=2", "img_size=32", "patch_size=8"]
SMALL_HF = ["num_hidden_layers=4", "hidden_size=32", "intermediate_size=64", "image_size=32"]
SMALL_HF += ["num_attention_heads=2", "patch_size=8"]
SMALL_SWIN = ["img_size=32", "patch_size=2", "embed_dim=16", "window_size=4", "depths=[2, 4]"]
SMALL_SWIN += ["num_heads=[2, 4]"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "140"})


def inspect(model: str, *options: str, rest: tuple[str, ...] = ()) -> Any:
    return run("inspect", model, *options, *rest)


def words(text: str) -> list[list[str]]:
    """The words of each line: column widths do not matter."""
    return [line.split() for line in text.splitlines()]


def test_every_command_has_help() -> None:
    listed = run("--help")
    assert run().output == listed.output  # with nothing given
    for line in listed.stdout.partition("Start with one of these:")[2].splitlines():
        name, *command = line.split() or [""]
        if name == "tokenprune":
            assert run(command[0], "--help").exit_code == 0
            asked = [part for part in command[1:] if part.startswith("--")]
            assert all(option in run(command[0], "--help").stdout for option in asked)
    for command in COMMANDS:
        assert command in listed.stdout
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert f"Usage: tokenprune {command}" in shown.stdout


def test_the_version_is_that_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert run("--version").stdout == f"tokenprune {package['version']}\n"


def test_recipes_are_listed() -> None:
    result = run("recipes")
    names = tokenprune.list_recipes()
    assert result.exit_code == 0
    assert f"{len(names)} recipes" in result.stdout
    listed = {line[0] for line in words(result.stdout) if line}
    assert set(names) <= listed
    line = next(line for line in words(result.stdout) if "dynamicvit-swin-tiny-k0.7" in line)
    assert line[1:] == [
        *("timm:swin_tiny_patch4_window7_224", "bypass", "5,", "6,", "7", "0.7,", "0.5,", "0.3")
    ]


def test_a_recipe_is_shown_as_it_is_written() -> None:
    result = run("recipes", "show", "dynamicvit-deit-small-k0.7")
    assert result.exit_code == 0
    assert "# Source:  Rao et al." in result.stdout
    assert "schedule: {blocks: [3, 6, 9], keep_ratio: 0.7}" in result.stdout


def test_a_recipe_file_is_shown_in_full(tmp_path: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nschedule: {blocks: [1], keep_ratio: 0.5}\n")
    result = run("recipes", "show", str(file))
    assert "backbone_lr_scale: 0.01" in result.stdout


def test_an_unknown_recipe_names_the_nearest() -> None:
    result = run("recipes", "show", "dynamicvit-deit-smal-k0.7")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: No recipe is named 'dynamicvit-deit-smal-k0.7'.")
    assert "'dynamicvit-deit-small-k0.7'" in result.stderr


def test_debug_shows_where_an_error_comes_from() -> None:
    result = run("--debug", "recipes", "show", "nothing")
    assert isinstance(result.exception, tokenprune.errors.UnknownRecipeError)


def test_adapters_are_listed() -> None:
    result = run("adapters")
    assert result.exit_code == 0
    assert {line[0] for line in words(result.stdout) if line} >= set(tokenprune.list_adapters())


@pytest.mark.parametrize(
    ("model", "options", "adapter", "norm"),
    [
        ("vit_tiny_patch16_224", SMALL_VIT, "timm/vision_transformer", "norm"),
        ("transformers:ViTForImageClassification", SMALL_HF, "transformers/vit", "vit.layernorm"),
        ("transformers:vit", SMALL_HF, "transformers/vit", "vit.layernorm"),
    ],
)
def test_inspect(model: str, options: list[str], adapter: str, norm: str) -> None:
    result = inspect(model, *options, rest=("--recipe", "dynamicvit-k0.7"))
    assert result.exit_code == 0, result.output
    lines = words(result.stdout)
    assert ["adapter", adapter] in lines
    assert ["final", "norm", norm] in lines
    assert ["prefix", "tokens", "1"] in lines
    prefix = "vit.layers" if "transformers" in model else "blocks"
    assert ["0", "to", "3", "entry,", "middle", "yes", "17"] in [line[:7] for line in lines]
    assert ["0", "1", f"({prefix}.1)", "16", "->", "11", "68.8", "%"] in lines
    costs = {line[0]: line for line in lines if line and line[0].startswith(prefix)}
    assert [costs[f"{prefix}.{n}"][1] for n in range(4)] == ["16", "11", "7", "5"]
    assert ["mask", "=", "gather", "on", "random", "kept", "sets"] in [line[:7] for line in lines]


def test_inspect_a_windowed_host() -> None:
    deeper = [*SMALL_SWIN, "depths=[4, 4]"]  # windows leave after the first block
    result = inspect("swin_tiny_patch4_window7_224", *deeper, rest=("--no-proof",))
    assert result.exit_code == 0, result.output
    lines = words(result.stdout)
    assert ["mode", "bypass"] in lines
    told = " ".join(result.stdout.split())
    assert "Stages of windows-falling-k0.7" in told
    assert "auto chose windows-falling-k0.7: it saves" in told
    assert "merge-k0.7, remove-k0.7 are refused: Block 0 ('layers.0.blocks.0') has to keep" in told
    assert "auto takes what saves most of the MACs; of what is within 2 points of that" in told
    assert "Certificate" not in result.stdout


def test_inspect_with_a_recipe_and_an_adapter(tmp_path: Any) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: mine\nstages: [{block: 2, keep_ratio: 0.5}]\n")
    rest = ("--recipe", str(file), "--adapter", "generic", "--no-proof")
    result = inspect("timm:vit_tiny_patch16_224", *SMALL_VIT, rest=rest)
    assert result.exit_code == 0, result.output
    assert "Stages of mine" in result.stdout
    assert "4 blocks of class Block, from blocks.0" in result.stdout  # the adapter's notes
    assert ["0", "2", "(blocks.2)", "16", "->", "8", "50.0", "%"] in words(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "No transformer block is found in ResNet"),
        (["vit_tny_patch16_224"], r"timm has no model named 'vit_tny_patch16_224'. Did you mean"),
        (["ViTForImageClassification"], "write transformers:ViTForImageClassification"),
        (["transformers:ViTForImageClasification"], "Did you mean 'ViTForImageClassification'"),
        (["keras:vit"], "Models come from timm or transformers, found 'keras'"),
        (["vit_tiny_patch16_224", "depth"], "An option is written KEY=VALUE, found 'depth'"),
        (["vit_tiny_patch16_224", "depth=["], "The value of option 'depth=[' cannot be read"),
        (["vit_tiny_patch16_224", "dept=3"], "timm cannot build 'vit_tiny_patch16_224' with"),
        (["transformers:vit", "hidden_size=big"], "transformers cannot build 'vit' with"),
        (["transformers:vit", "hiden_size=8"], "has no option 'hiden_size'. Did you mean"),
        (["vit_tiny_patch16_224", "--recipe", "nothing"], "No recipe is named 'nothing'"),
        (["vit_tiny_patch16_224", "--adapter", "timm/vit"], "No adapter is named 'timm/vit'"),
    ],
)
def test_what_inspect_refuses(arguments: list[str], message: str) -> None:
    result = run("inspect", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_recipe_of_the_other_mode_is_refused() -> None:
    rest = ("--recipe", "dynamicvit-deit-tiny-k0.7")
    result = inspect("swin_tiny_patch4_window7_224", *SMALL_SWIN, "depths=[2, 8]", rest=rest)
    assert result.exit_code == 2
    assert "needs `mode: bypass`" in result.stderr


def test_names_of_models() -> None:
    assert split_name("deit_small_patch16_224") == ("timm", "deit_small_patch16_224")
    assert split_name("transformers:vit") == ("transformers", "vit")
    assert split_name("hf-hub:timm/vit_tiny") == ("timm", "hf-hub:timm/vit_tiny")
    with pytest.raises(HostError, match=r"found 'torchvision' in 'torchvision:vit_b_16'"):
        split_name("torchvision:vit_b_16")


def test_options_are_yaml() -> None:
    given = ["depths=[2, 2]", "drop=0.1", "name=a=b", "flag=false"]
    assert parse_options(given) == {"depths": [2, 2], "drop": 0.1, "name": "a=b", "flag": False}


def test_options_are_read_as_recipes_are() -> None:
    assert parse_options(["eps=1e-6", "pool=no"]) == {"eps": 1e-6, "pool": "no"}
    with pytest.raises(HostError, match=r"value of option .* cannot be read"):
        parse_options(["x=[1"])
    with pytest.raises(HostError, match="names no host: kwargs"):
        host_section("timm:vit_tiny_patch16_224", ["x=[[1]]"])
    with pytest.raises(HostError, match="names no host: model"):
        host_section("timm:", [])


def spec(mode: Any, *blocks: str) -> tokenprune.ArchSpec:
    return tokenprune.ArchSpec(adapter="x", blocks=blocks, num_prefix_tokens=1, mode=mode)


def test_the_recipe_that_inspect_takes_by_itself() -> None:
    twelve = spec("remove", *(f"blocks.{n}" for n in range(12)))
    shipped = recipe_for("timm:deit_small_patch16_224", twelve)
    assert shipped.name == "dynamicvit-deit-small-k0.7"
    assert recipe_for("deit_tiny_patch16_224", twelve).name == "dynamicvit-deit-tiny-k0.7"
    assert recipe_for("other", twelve) is None
    short = spec("remove", *(f"blocks.{n}" for n in range(3)))  # the shipped one does not fit
    assert recipe_for("deit_small_patch16_224", short) is None


def test_without_the_packages_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("tokenprune.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install 'tokenprune-torch[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_without_a_model_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "tokenprune.models", raising=False)
    result = run("inspect", f"{library}:vit")
    assert result.exit_code == 2
    assert f"pip install 'tokenprune-torch[{library}]'" in result.stderr


def test_json_of_what_is_listed() -> None:
    assert {row["adapter"] for row in json.loads(run("adapters", "--json").stdout)} == set(
        tokenprune.list_adapters()
    )
    first = json.loads(run("recipes", "--json").stdout)[0]
    assert first.keys() == {"recipe", "host", "mode", "blocks", "keep_ratios"}
    found = json.loads(run("env", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert "threads" in run("env").stdout


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PRINT_TABLES = {"demo", "train", "eval", "inspect", "benchmark", "compare", "calibrate", "export"}
PRINT_TABLES |= {"recipes", "adapters", "env"}
WRITE = {"demo", "train", "benchmark", "compare", "calibrate", "export", "visualize", "convert"}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_all_commands_share(name: str) -> None:
    given = [option for parameter in COMMANDS[name].params for option in parameter.opts]
    assert ("--json" in given) == (name in PRINT_TABLES)
    assert ("-o" in given and "--output" in given) == (name in WRITE)


def test_a_line_every_few_seconds_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "EVERY", 0.01)
    with console.working("tracing"):
        time.sleep(0.2)
    with console.bar("training") as step:
        time.sleep(0.02)
        step(1, 4, {"loss": 0.5})
    with console.progress("comparing", "rows") as told:
        time.sleep(0.02)
        told(2, 3, "merge-k0.7")
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("tracing: 0 s") > 1
    assert lines[-2:] == [
        "training: 1/4 steps, loss 0.500, 0 s",
        "comparing: 2/3 rows, merge-k0.7, 0 s",
    ]
    monkeypatch.setenv("RANK", "1")
    with console.bar("training") as step, console.working("tracing"):
        time.sleep(0.05)
        step(1, 4, {})
    assert capsys.readouterr().err == ""


def test_a_reader_that_went_away_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("tokenprune.cli.lists.list_recipes", fail)
    result = run("recipes")
    assert result.exit_code == 1
    assert result.output == ""


def test_a_fault_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr("tokenprune.cli.lists.list_recipes", fail)
    result = run("recipes")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ZeroDivisionError: x\nThis is a fault of tokenprune")
    assert "Traceback" not in result.output
    assert isinstance(run("--debug", "recipes").exception, ZeroDivisionError)
    assert run("recipes", "--unknown").exit_code == 2  # typer's own


def test_the_shell_completes() -> None:
    asked = {"_TOKENPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "tokenprune ins"}
    asked |= {"COMP_CWORD": "1"}
    found = CliRunner().invoke(app, [], env=asked, prog_name="tokenprune")
    assert "inspect" in found.stdout.split()


def test_the_installed_command_ends_with_its_exit_code() -> None:
    code = "import sys; sys.argv = ['tokenprune', 'recipes', 'show', 'x']; "
    code += "from tokenprune.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No recipe is named 'x'.")
    assert done.stdout == ""
