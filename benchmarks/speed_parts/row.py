"""A row of the tables: one host in one mode at one batch size, over several processes."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from benchmarks.speed_parts.hosts import SpeedHost

__all__ = ["How", "SpeedRow", "rows_of"]

How = Literal["eager", "kept", "compile"]
# 4 GiB: blocks below it come from the heap, and the heap is never trimmed.
KEEPING = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"


@dataclass(frozen=True)
class SpeedRow:
    """One host at one batch size.

    Attributes:
        host: its name.
        plain: as in `SpeedHost`.
        how: eager; kept: eager in processes that keep freed memory; compile: both sides compiled.
        batch: images in a forward.
        dense: median seconds of the dense host.
        pruned: median seconds of the wrapped one.
        speedup: median over the rounds of dense / pruned of a round.
        low: smallest of those ratios.
        high: largest.
        bound: dense MACs / pruned MACs.
        rounds: how many, over all processes.
        processes: how many.
        outside: median of `Sample.outside`; None where it was not measured.
        dense_kernel: the same of `Sample.dense_kernel`.
        pruned_kernel: the same of `Sample.pruned_kernel`.
    """

    host: str
    plain: bool
    how: How
    batch: int
    dense: float
    pruned: float
    speedup: float
    low: float
    high: float
    bound: float
    rounds: int
    processes: int = 1
    outside: float | None = None
    dense_kernel: float | None = None
    pruned_kernel: float | None = None


def rows_of(
    host: SpeedHost, how: How, batches: tuple[int, ...], budget: float, processes: int
) -> list[SpeedRow]:
    """Measure a host.

    Args:
        host: which.
        how: in which mode.
        batches: sizes.
        budget: seconds of measurement at each batch size, about, over all processes.
        processes: how many, one after the other.
    """
    samples: dict[int, list[dict[str, Any]]] = defaultdict(list)
    command = [sys.executable, "-m", "benchmarks.speed_parts.measure", host.name, how]
    command += [str(budget / processes), *map(str, batches)]
    environment = dict(os.environ)
    if how == "kept":
        environment["GLIBC_TUNABLES"] = KEEPING
    for _ in range(processes):
        run = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        for sample in map(json.loads, run.stdout.splitlines()):
            samples[sample["batch"]].append(sample)
    return [_row(host, how, batch, found) for batch, found in samples.items()]


def _row(host: SpeedHost, how: How, batch: int, samples: list[dict[str, Any]]) -> SpeedRow:
    dense = [seconds for sample in samples for seconds in sample["dense"]]
    pruned = [seconds for sample in samples for seconds in sample["pruned"]]
    ratios = [slow / fast for slow, fast in zip(dense, pruned, strict=True)]
    shares = {
        name: None if samples[0][name] is None else median(sample[name] for sample in samples)
        for name in ("outside", "dense_kernel", "pruned_kernel")
    }
    return SpeedRow(
        *(host.name, host.plain, how, batch),
        dense=median(dense),
        pruned=median(pruned),
        speedup=median(ratios),
        low=min(ratios),
        high=max(ratios),
        bound=samples[0]["bound"],
        rounds=len(ratios),
        processes=len(samples),
        **shares,
    )
