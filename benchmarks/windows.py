"""Windows, bypass and skip: what a small Swin loses on Fashion-MNIST; the time Swin-T gains.

    OMP_NUM_THREADS=1 python -m benchmarks.windows accuracy --data FOLDER [--work FOLDER]
    OMP_NUM_THREADS=2 python -m benchmarks.windows speed

FOLDER holds the four idx files of Fashion-MNIST. The dense host is trained first and kept in
--work. Each mode then prunes it at three budgets, the same share of the tokens (or windows) at each
of its stages, on all test images: without training, and after --epochs over the training images
with labels, on the path that eval runs.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenprune
from benchmarks.markdown import table as as_table
from tokenprune.cost.timing import interleaved
from tokenprune.train.idx import read_idx_folder

HOST = {
    "img_size": 32,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "window_size": 4,
}
ARMS = {
    "windows": ({"mode": "windows", "scorer": "token-norm"}, (1, 2)),
    "bypass": ({"mode": "bypass", "scorer": "token-norm"}, (0, 2)),
    "skip": ({"mode": "skip"}, (0, 2)),
}
KEEP = (0.75, 0.5, 0.25)
BATCH = 128


def images_of(part: Any) -> tuple[Tensor, Tensor]:
    """All images of a part, padded to 32 x 32 and normalised, and their labels."""
    images, labels = part
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float()
    return F.pad(pixels.unsqueeze(1) / 255, (2, 2, 2, 2)).sub_(0.286).div_(0.353), torch.tensor(
        labels
    )


def train(model: nn.Module, part: tuple[Tensor, Tensor], epochs: float, rate: float) -> float:
    """AdamW with one cycle, images mirrored by chance; minutes of CPU time."""
    images, labels = part
    steps = int(epochs * len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    generator, started = torch.Generator().manual_seed(0), time.process_time()
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
        given = torch.where(mirrored, images[chosen].flip(-1), images[chosen])
        loss = F.cross_entropy(model(given), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    model.eval()
    return (time.process_time() - started) / 60


@torch.inference_mode()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of the images that are told right."""
    images, labels = part
    found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return float((found == labels).float().mean())


def accuracy_rows(data: Path, work: Path, dense_epochs: float, epochs: float) -> list[Any]:
    """One row for each arm and budget."""
    _, *parts = read_idx_folder(data)
    fit, test = map(images_of, parts)
    torch.manual_seed(0)
    host = timm.models.swin_transformer.SwinTransformer(**HOST)
    file = work / "swin.safetensors"
    if file.exists():
        host.load_state_dict(load_file(file))
    else:
        minutes = train(host, fit, dense_epochs, 2e-3)
        save_file(host.state_dict(), file)
        print(f"dense: {minutes:.1f} CPU minutes")
    dense = accuracy(host.eval(), test)
    rows = [["dense", "1", "", f"{100 * dense:.2f} %", ""]]
    print(rows[-1], flush=True)
    for name, (parts_of, blocks) in ARMS.items():
        for keep in KEEP:
            stages = [{"block": block, "keep_ratio": keep} for block in blocks]
            recipe = {"version": 1, **parts_of, "stages": stages}
            torch.manual_seed(0)
            model = tokenprune.wrap(
                copy.deepcopy(host),
                recipe,
                example_inputs=fit[0][:2],
                verify=False,
                train=bool(epochs),
            )
            saved = 100 * (1 - tokenprune.profile(model).ratio)
            row = [
                name,
                f"{keep}",
                f"{saved:.1f} %",
                f"{100 * (accuracy(model, test) - dense):+.2f}",
            ]
            trained = ""
            if epochs:
                train(model, fit, epochs, 3e-4)
                trained = f"{100 * (accuracy(model, test) - dense):+.2f}"
            rows.append([*row, trained])
            print(rows[-1], flush=True)
    return rows


def speed(rounds: int) -> dict[str, float]:
    """Swin-T at batch 8, windows at 50 % and bypass at 50 % against dense."""
    torch.manual_seed(0)
    host = timm.create_model("swin_tiny_patch4_window7_224").eval()
    x, calls = torch.randn(8, 3, 224, 224), {"dense": host}
    for mode in ("windows", "bypass"):
        recipe = {
            "version": 1,
            "mode": mode,
            "scorer": "token-norm",
            "schedule": {"keep_ratio": 0.5},
        }
        calls[mode] = tokenprune.wrap(copy.deepcopy(host), recipe, verify=False, train=False)
    with torch.inference_mode():
        timed = interleaved({n: lambda call=c: call(x) for n, c in calls.items()}, rounds=rounds)
    seconds = {name: timing.seconds for name, timing in timed.items()}
    return {f"{name}, x dense": seconds["dense"] / s for name, s in seconds.items()} | seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.windows")
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/windows"))
    parser.add_argument("--dense-epochs", type=float, default=1.5)
    parser.add_argument("--epochs", type=float, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.what == "speed":
        print(
            json.dumps(
                {name: round(value, 3) for name, value in speed(options.rounds).items()}, indent=1
            )
        )
        return
    options.work.mkdir(parents=True, exist_ok=True)
    rows = accuracy_rows(options.data, options.work, options.dense_epochs, options.epochs)
    heads = ["arm", "keep", "MACs saved", "accuracy, minus dense in points", "after training"]
    print(as_table(heads, rows))


if __name__ == "__main__":
    main()
