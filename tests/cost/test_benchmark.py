"""`benchmark`: what it times, and what it says of the figures."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

import tokenprune
from tokenprune.cli.app import app
from tokenprune.cost.benchmark import BatchTiming, Benchmark
from tokenprune.cost.replay import replay_of
from tokenprune.errors import HostError, NotWrappedError, PlanError
from tokenprune.runtime.model import pruning_of

VIT = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}


def wrapped(
    recipe: Any = "learned-k0.5", name: str = "vit_tiny_patch16_224", **options: Any
) -> Any:
    host = timm.create_model(name, **(options or SMALL)).eval()
    return tokenprune.wrap(host, recipe, verify=False, train=False)


def row(batch: int, dense: float, pruned: float, replay: float | None = None) -> BatchTiming:
    return BatchTiming(batch, dense, pruned, replay, None, None)


@pytest.mark.parametrize(
    ("macs", "rows", "said"),
    [
        (0.98, [row(1, 1, 0.5)], "Does not pay: only 2.0 % of the MACs are saved."),
        (
            0.65,
            [row(1, 1, 1.2), row(8, 8, 8.5), row(32, 32, 24), row(64, 64, 46)],
            "Pays from batch 32 on: 1.39x at 64; the MACs predict 1.54x.",
        ),
        (0.65, [row(1, 3, 2)], "Pays from batch 1 on: 1.50x at 1; the MACs predict 1.54x."),
        (
            0.65,
            [row(1, 3, 5), row(8, 3.3, 5.2)],
            "Does not pay up to batch 8 (0.63x): dense takes 1.10 times as long for 8 images as "
            "for 1, so the device waits for launches. Try larger batches, torch.compile or a CUDA "
            "graph.",
        ),
        (
            0.65,
            [row(1, 1, 2, 1), row(8, 8, 9, 8)],
            "Does not pay up to batch 8 (0.89x): the host on as many tokens is no faster itself "
            "(1.00x): its time is not in the arithmetic that fewer tokens save.",
        ),
        (
            0.65,
            [row(1, 1, 2, 0.7), row(8, 8, 8.4, 5.5)],
            "Does not pay up to batch 8 (0.95x): choosing and moving tokens costs more than the "
            "other blocks save. Try larger batches, fewer stages, `freeze_guards`, or "
            "torch.compile.",
        ),
    ],
)
def test_what_it_says(macs: float, rows: list[BatchTiming], said: str) -> None:
    found = Benchmark("Host", "CPU", False, macs, tuple(rows), (128,))
    assert found.verdict == said
    assert str(found).endswith(f"{said}\nNo time was left for batch 128.")
    assert found.to_dict()["verdict"] == said


def test_it_times_all_sides_and_changes_nothing(tmp_path: Path) -> None:
    model, steps = wrapped().train(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also of predictors that have not learned
        found = tokenprune.benchmark(
            model, batches=(3, 1, 1), progress=lambda *step: steps.append(step)
        )
    assert [timing.batch for timing in found.rows] == [1, 3]
    assert all(min(t.dense, t.pruned, t.replay or 0.0) > 0 for t in found.rows)
    assert found.macs == tokenprune.profile(model).ratio
    assert steps[-1] == (10, 10, "batch 3")
    assert model.training
    assert not pruning_of(model).fitted
    assert found.plot(tmp_path / "deep" / "speed.png").stat().st_size > 1000


def test_larger_batches_are_left_out_when_time_is_up() -> None:
    found = tokenprune.benchmark(wrapped(), batches=(1, 2, 4), seconds=0.0)
    assert [timing.batch for timing in found.rows] == [1]
    assert found.left_out == (2, 4)


def test_a_replay_runs_on_the_tokens_that_are_left() -> None:
    model, seen = wrapped(), []
    arguments = pruning_of(model).inputs(None)
    replay = replay_of(model, arguments)
    assert replay is not None
    for block in replay.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))  # type: ignore[union-attr]
    arguments.call(replay)
    kept = tokenprune.profile(model).tokens_per_block
    assert seen == [1 + count for count in kept]
    swin = {"img_size": 32, "window_size": 2, "embed_dim": 12, "num_heads": (1, 2, 2, 2)}
    windows = wrapped(None, "swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), **swin)
    assert replay_of(windows, pruning_of(windows).inputs(None)) is None


@pytest.mark.parametrize("batches", [(), (0,), (1, 2.0)])
def test_what_is_no_batch_size(batches: Any) -> None:
    with pytest.raises(PlanError, match="give whole numbers above 0"):
        tokenprune.benchmark(wrapped(), batches=batches)


def test_other_mistakes() -> None:
    with pytest.raises(NotWrappedError):
        tokenprune.benchmark(timm.create_model("vit_tiny_patch16_224", **SMALL))  # type: ignore[arg-type]
    with pytest.raises(HostError):
        tokenprune.benchmark(wrapped(), (torch.zeros(1, 3, 20, 20),))


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        options = [f"{key}={value}" for key, value in SMALL.items()]
        given = ["benchmark", "vit_tiny_patch16_224", *options, "--device", "cpu", *arguments]
        return CliRunner().invoke(app, given)

    result = run("--recipe", "merge-k0.7", "--batch", "1,2", "--output", str(tmp_path / "a.png"))
    assert result.exit_code == 0, result.output
    assert "the MACs predict" in result.output or "Does not pay" in result.output
    assert (tmp_path / "a.png").exists()
    result = run("--batch", "2", "--json", "--output", str(tmp_path / "b.png"))
    assert (tmp_path / "b.png").exists()
    assert json.loads(result.stdout)["rows"][0]["batch"] == 2
    for wrong in (["--batch", "1,x"], ["--device", "gpux"], ["--dtype", "int8"]):
        result = run(*wrong)
        assert result.exit_code == 2
        assert wrong[0] in result.output
