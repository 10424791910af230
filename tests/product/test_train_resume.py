"""A killed run ends with the weights of one that was not; two processes train one model."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# A run with everything that holds state: augmentation, mixing, dropout, noise, weight average,
# accumulation. Two epochs of four steps; the last step of an epoch is short.
RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import timm, tokenprune
from safetensors.torch import save_file
from tokenprune.train import DataBundle, fit, image_trainer, load_data, run_folder
from tokenprune.train.images import ImageSet

RECIPE = {
    "version": 1,
    "schedule": {"blocks": [1, 2], "keep_ratio": 0.6},
    "train": {
        "epochs": 2, "batch_size": 16, "learning_rate": 0.01, "backbone_lr_scale": 0.1,
        "warmup_epochs": 1, "frozen_epochs": 1, "mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9,
        "random_erasing": 0.5, "clip_grad": 1.0, "frozen_parameters": ["cls_token"],
    },
}

def some(images, count):
    return ImageSet(
        images.images[:count], images.labels[:count], images.transform, augments=images.augments,
    )

recipe = tokenprune.Recipe.parse(RECIPE)
whole = load_data(None, 16, train=recipe.train)  # once for all jobs
data = DataBundle(
    train=some(whole.train, 56), eval=some(whole.eval, 20),
    class_names=whole.class_names, image_size=16,
)

def job(folder, out, kill_at=0, kill_in="never", save_every="epoch"):
    torch.manual_seed(1)
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2,
        num_classes=10, drop_path_rate=0.2, proj_drop_rate=0.1,
    )
    model = tokenprune.wrap(host, recipe, verify=False)

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(step, total, logs):
        if step == kill_at and kill_in == "step":
            kill()

    def mark(checkpoint):
        if checkpoint.name == f"checkpoint-{kill_at}" and kill_in == "save":
            kill()
        run_folder.mark_whole(checkpoint)

    image_trainer.mark_whole = mark
    result = fit(
        recipe, model, data, folder, accumulation_steps=2, progress=progress, save_every=save_every
    )
    rank = os.environ.get("RANK", "0")
    save_file(model.state_dict(), f"{out}_{rank}.safetensors")
    Path(f"{out}_{rank}.json").write_text(json.dumps(result.history))

if sys.argv[1] == "fork":  # one import for many runs, each in a process of its own
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            job(*json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    for arguments in json.loads(sys.argv[1]):
        job(*arguments)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "run.py"
    file.write_text(RUN, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def start(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """A function that runs a job in a new process and returns its exit code."""
    log = tmp_path_factory.mktemp("log") / "errors"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(script), "fork"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as server,
    ):

        def run(*arguments: Any) -> int:
            print(json.dumps(arguments, default=str), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            if code not in (0, -signal.SIGKILL):
                pytest.fail(log.read_text()[-3000:])
            return code

        yield run
        server.stdin.close()


def results(out: Path, rank: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return load_file(f"{out}_{rank}.safetensors"), json.loads(
        Path(f"{out}_{rank}.json").read_text()
    )


@pytest.fixture(scope="module")
def unbroken(start: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert start(folder / "run", folder / "out") == 0
    return folder / "out"


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("kill_at", "kill_in", "save_every", "resumes_from"),
    [
        pytest.param(7, "step", 3, "checkpoint-6", id="in mid-epoch, saved in mid-epoch"),
        pytest.param(6, "step", "epoch", "checkpoint-4", id="in mid-epoch, saved at its start"),
        pytest.param(8, "save", "epoch", "checkpoint-4", id="while it saves"),
    ],
)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    start: Callable[..., int],
    unbroken: Path,
    tmp_path: Path,
    kill_at: int,
    kill_in: str,
    save_every: str | int,
    resumes_from: str,
) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    assert start(folder, out, kill_at, kill_in, save_every) == -signal.SIGKILL
    assert not Path(f"{out}_0.json").exists()
    whole = sorted(mark.parent.name for mark in folder.glob("checkpoint-*/whole"))
    assert whole[-1] == resumes_from

    assert start(folder, out, 0, "never", save_every) == 0
    weights, history = results(out)
    expected, expected_history = results(unbroken)
    assert equal(weights, expected)
    assert last_loss(history) == last_loss(expected_history)
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [4, 8]


def last_loss(history: list[dict[str, float]]) -> float:
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]


def test_two_processes_train_one_model(script: Path, tmp_path: Path) -> None:
    jobs = [[str(tmp_path / name), str(tmp_path / f"{name}_out")] for name in ("first", "second")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), json.dumps(jobs)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    weights, history = results(tmp_path / "first_out", rank=0)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)
    for name, rank in (("first", 1), ("second", 0), ("second", 1)):
        again, same_history = results(tmp_path / f"{name}_out", rank)
        assert equal(again, weights)
        assert last_loss(same_history) == last_loss(history)

    checkpoint = tmp_path / "first" / "checkpoint-8"
    noise = [load_file(checkpoint / f"noise_{rank}.safetensors")["noise"] for rank in (0, 1)]
    assert not torch.equal(*noise)
