"""Time and memory of training on the mask path against the dense host: writes docs/training.md.

    OMP_NUM_THREADS=2 python -m benchmarks.training

Time is measured interleaved in one process; memory, one process per kind.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.training_parts.attention import SHAPE, Way, measure_ways
from benchmarks.training_parts.steps import Kind, make_step, peak_bytes, squares
from tokenprune.cost.timing import Timing, interleaved

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
KINDS: tuple[Kind, ...] = ("dense", "mask")
BAR = 1.15
HEAD = """# What training costs

One step of DeiT-S (forward, loss, backward, AdamW) on the mask path, with its three predictors,
against the same step of the dense host; without the teacher of distillation. {threads} CPU
threads, float32, torch {torch}, random images. Made by

    OMP_NUM_THREADS={threads} python -m benchmarks.training

The mask path removes nothing: it runs every token through every block, so that the decision has a
gradient. It adds the predictors and the policy of attention.

## A step

| batch | dense, s | mask, s | time | spread | dense, MiB | mask, MiB | memory | <= {bar} |
|---|---|---|---|---|---|---|---|---|
{steps}

Time is the ratio of medians over {rounds} interleaved rounds, spread the largest distance of a
round from its median; memory is the largest resident size over two steps, minus that before
the model was built. The predictors alone, which see every token here, are 3 % of the
dense MACs; most of the rest is attention's backward pass under a policy. Tensors [B, H, L, L] kept
for backward: dense {dense_squares}, mask {mask_squares}.

## Implementations of attention

Forward and backward at {shape} (batch, heads, tokens, channels), {kept:.0%} of the tokens kept.
*Leak* is how much a kept row changes when dropped tokens hold larger numbers; *gradient* how far
the policy's gradient is from the exact one in float64, relative to its largest entry.

| implementation | time | kept for backward, MiB | [L, L] kept | leak | gradient |
|---|---|---|---|---|---|
{ways}

{verdict}
"""
VERDICT = """Only the two exact implementations do not leak: log(policy) needs an eps for log(0),
which leaks, and as a channel it also hides a query's own key. Of the exact ones the first is faster
and keeps no [L, L] tensor, so it is the operator (`tokenprune/ops/attention.py`)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _options(arguments)
    if options.peak:
        kind, batch_size = options.peak
        print(peak_bytes(kind, int(batch_size)))
        return
    found = []
    for batch_size in options.batch:
        peaks = {kind: _peak(kind, batch_size) for kind in KINDS}
        steps = {kind: make_step(kind, batch_size) for kind in KINDS}
        timings = interleaved(steps, rounds=options.rounds)
        found.append(_entry(batch_size, timings, peaks))
        print(found[-1], file=sys.stderr, flush=True)
    ways = measure_ways(options.rounds)
    data = {
        "steps": found,
        "attention": [vars(way) for way in ways],
        "squares": {kind: squares(kind) for kind in KINDS},
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }
    (options.docs / "training.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.docs / "training.md").write_text(_page(data, ways))


def _peak(kind: Kind, batch_size: int) -> int:
    line = [sys.executable, "-m", "benchmarks.training", "--peak", kind, str(batch_size)]
    # one arena, and large blocks returned at once: resident memory is memory in use
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        line, check=True, capture_output=True, text=True, env={**os.environ, **allocator}, cwd=ROOT
    )
    return int(done.stdout)


def _entry(batch_size: int, timings: dict[str, Timing], peaks: dict[Kind, int]) -> dict[str, float]:
    dense, mask = timings["dense"], timings["mask"]
    return {
        "batch": batch_size,
        "dense_seconds": dense.seconds,
        "mask_seconds": mask.seconds,
        "time": mask.seconds / dense.seconds,
        "spread": max(dense.spread, mask.spread),
        "dense_bytes": peaks["dense"],
        "mask_bytes": peaks["mask"],
        "memory": peaks["mask"] / peaks["dense"],
    }


def _page(data: dict[str, object], ways: Sequence[Way]) -> str:
    steps: list[dict[str, float]] = data["steps"]  # type: ignore[assignment]
    counted: dict[str, int] = data["squares"]  # type: ignore[assignment]
    rows = []
    for s in steps:
        holds = "yes" if max(s["time"], s["memory"]) <= BAR else "**no**"
        rows.append(
            f"| {s['batch']} | {s['dense_seconds']:.2f} | {s['mask_seconds']:.2f} | "
            f"{s['time']:.3f}x | {s['spread']:.0%} | {s['dense_bytes'] / 2**20:.0f} | "
            f"{s['mask_bytes'] / 2**20:.0f} | {s['memory']:.3f}x | {holds} |"
        )
    lines = [
        f"| {way.name} | {way.time:.2f}x | {way.kept_bytes / 2**20:.0f} | "
        f"{'yes' if way.square else 'no'} | {_small(way.leak)} | {_small(way.gradient)} |"
        for way in ways
    ]
    return HEAD.format(
        threads=data["threads"],
        rounds=data["rounds"],
        torch=torch.__version__.partition("+")[0],
        bar=BAR,
        steps="\n".join(rows),
        dense_squares=counted["dense"],
        mask_squares=counted["mask"],
        shape=list(SHAPE),
        kept=0.7,
        ways="\n".join(lines),
        verdict=VERDICT,
    )


def _small(value: float) -> str:
    return "-" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32], help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "BATCH"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
