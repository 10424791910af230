"""What pruning gains on this machine: dense, pruned, and the host on as many tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from tokenprune.cost.profile import profile
from tokenprune.cost.replay import replay_of
from tokenprune.cost.timing import interleaved
from tokenprune.errors import PlanError
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.report.plots import draw_speed
from tokenprune.report.progress import ShowProgress, steps
from tokenprune.report.table import Table
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.runtime.pruning import Pruning
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.state import in_mode

__all__ = ["BatchTiming", "Benchmark", "benchmark"]

ROUNDS, TURN_SECONDS = 5, 0.15
GAINS = 1.02
"""Times dense above which a gain is more than noise."""
IDLE = 1.5
"""Dense time of the largest batch over that of the smallest; below this the device has room."""


@dataclass(frozen=True)
class BatchTiming:
    """One batch size; seconds a call, bytes.

    Attributes:
        batch: Images.
        dense: Seconds of the host.
        pruned: Of the wrapped model, with its guards.
        replay: Of the host on as many tokens, without selection; None where there is no such thing.
        dense_memory: Peak of a call beyond what is there before, on CUDA; None elsewhere.
        pruned_memory: The same of the wrapped model.
    """

    batch: int
    dense: float
    pruned: float
    replay: float | None
    dense_memory: int | None
    pruned_memory: int | None

    @property
    def speedup(self) -> float:
        """Dense time / pruned time."""
        return self.dense / self.pruned


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured.

    Attributes:
        host: Its class.
        device: What it ran on.
        compiled: Every side ran under torch.compile.
        macs: Share of the dense MACs.
        rows: One for each batch size that was measured.
        left_out: Batch sizes for which time ran out.
    """

    host: str
    device: str
    compiled: bool
    macs: float
    rows: tuple[BatchTiming, ...]
    left_out: tuple[int, ...] = ()

    @property
    def verdict(self) -> str:
        """From which batch size on pruning pays here; or why it does not."""
        gain, last = 1 / self.macs, self.rows[-1]
        if gain < 1.05:
            return f"Does not pay: only {100 * (1 - self.macs):.1f} % of the MACs are saved."
        slow = [row.batch for row in self.rows if row.speedup < GAINS]
        if last.speedup >= GAINS:
            start = next(r.batch for r in self.rows if all(s < r.batch for s in slow))
            return (
                f"Pays from batch {start} on: {last.speedup:.2f}x at {last.batch}; the MACs "
                f"predict {gain:.2f}x."
            )
        return f"Does not pay up to batch {last.batch} ({last.speedup:.2f}x): {self._reason()}"

    def _reason(self) -> str:
        first, last = self.rows[0], self.rows[-1]
        grown = last.dense / first.dense
        if last.batch > first.batch and grown < IDLE:
            return (
                f"dense takes {grown:.2f} times as long for {last.batch} images as for "
                f"{first.batch}, so the device waits for launches. Try larger batches, "
                "torch.compile or a CUDA graph."
            )
        if last.replay is not None and last.dense / last.replay < GAINS:
            return (
                f"the host on as many tokens is no faster itself ({last.dense / last.replay:.2f}x):"
                " its time is not in the arithmetic that fewer tokens save."
            )
        return (
            "choosing and moving tokens costs more than the other blocks save. Try larger batches, "
            "fewer stages, `freeze_guards`, or torch.compile."
        )

    def table(self) -> Table:
        """All that was measured."""
        mib = [row.dense_memory is not None for row in self.rows]
        columns = ["batch", "dense, ms", "pruned, ms", "speed-up", "without selection"]
        columns += ["dense, MiB", "pruned, MiB"] if any(mib) else []
        rows = []
        for row in self.rows:
            best = "-" if row.replay is None else f"{row.dense / row.replay:.2f}x"
            times = [f"{1e3 * row.dense:.2f}", f"{1e3 * row.pruned:.2f}", f"{row.speedup:.2f}x"]
            memory = [row.dense_memory, row.pruned_memory] if any(mib) else []
            cells = [str(row.batch), *times, best, *(f"{(m or 0) / 2**20:.0f}" for m in memory)]
            rows.append(tuple(cells))
        how = "torch.compile" if self.compiled else "eager"
        note = self.verdict
        if self.left_out:
            note += f"\nNo time was left for batch {', '.join(map(str, self.left_out))}."
        title = f"{self.host}, {self.device}, {how}, {self.macs:.3f} of the dense MACs"
        return Table(title, tuple(columns), tuple(rows), note)

    def __str__(self) -> str:
        return str(self.table())

    def plot(self, path: str | PathLike[str]) -> Path:
        """Write a picture of speed-up against batch size; its ending says which format.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        sides = {"pruned": [(row.batch, row.speedup) for row in self.rows]}
        replays = [(r.batch, r.dense / r.replay) for r in self.rows if r.replay is not None]
        if replays:
            sides["without selection"] = replays
        return draw_speed(Path(path), sides, 1 / self.macs)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, with `verdict`."""
        return {**asdict(self), "verdict": self.verdict}


def benchmark(
    model: PrunedModel,
    inputs: ExampleInputs | None = None,
    *,
    batches: Sequence[int] = (1, 8, 32),
    compiled: bool = False,
    seconds: float = 100.0,
    progress: ShowProgress = True,
) -> Benchmark:
    """Time a wrapped model against its dense host, where it is now, in eval.

    All sides take turns in each of several rounds; figures are medians. Beside them runs the host
    cut off in front of the blocks where stages sit: as many tokens, without any selection.

    Args:
        model: What `wrap` returned.
        inputs: As `wrap` takes `example_inputs`; repeated to each batch size. None draws some.
        batches: Numbers of images.
        compiled: Run every side under torch.compile.
        seconds: No batch size is begun that would likely end later.
        progress: Draw a bar; or a function of (done, of, text).

    Raises:
        NotWrappedError: The model is not wrapped.
        PlanError: No batch sizes, or one that is no whole number above 0.
        HostError: The inputs do not fit.
    """
    pruning = pruning_of(model)
    sizes = sorted(set(batches))
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise PlanError(f"asked for batches={list(batches)!r}: give whole numbers above 0.")
    example = pruning.inputs(inputs)
    device = next(iter(example.tensors.values())).device
    share, rows, started = profile(model, example).ratio, list[BatchTiming](), time.monotonic()
    host, replay = pruning.host, replay_of(model, example)
    models: dict[str, Any] = {"dense": host, "pruned": model}
    models |= {} if replay is None else {"replay": replay}
    if compiled:
        models = {name: torch.compile(side, dynamic=False) for name, side in models.items()}
    bar = steps("timing", ROUNDS * len(sizes), progress)
    with _unasked(pruning), in_mode(model, training=False), torch.no_grad(), bar as done:
        for size in sizes:
            if rows and time.monotonic() - started + _expected(rows[-1], size) > seconds:
                break
            given = _of_size(example, size)
            calls = {name: partial(given.call, side) for name, side in models.items()}
            after = partial(_said, done, size)
            found = interleaved(
                calls, rounds=ROUNDS, turn_seconds=TURN_SECONDS, device=device, after_round=after
            )
            times = {name: timing.seconds for name, timing in found.items()}
            memory = {name: _memory(calls[name], device) for name in ("dense", "pruned")}
            rows.append(
                BatchTiming(
                    batch=size,
                    dense=times["dense"],
                    pruned=times["pruned"],
                    replay=times.get("replay"),
                    dense_memory=memory["dense"],
                    pruned_memory=memory["pruned"],
                )
            )
    return Benchmark(
        host=type(host).__name__,
        device=_name(device),
        compiled=compiled,
        macs=share,
        rows=tuple(rows),
        left_out=tuple(sizes[len(rows) :]),
    )


@contextmanager
def _unasked(pruning: Pruning) -> Iterator[None]:
    """Without a look at whether predictors have learned: time does not depend on it."""
    was, pruning.fitted = pruning.fitted, True
    try:
        yield
    finally:
        pruning.fitted = was


def _said(done: Callable[[str], None], size: int, _round: int) -> None:
    done(f"batch {size}")


def _expected(row: BatchTiming, size: int) -> float:
    """Seconds that a larger batch will take if its time grows as its images do."""
    sides = row.dense + row.pruned + (row.replay or 0.0)
    return max(ROUNDS * TURN_SECONDS * 3, sides * (ROUNDS + 2) * size / row.batch)


def _of_size(example: Arguments, size: int) -> Arguments:
    """The same call with so many images."""
    tensors = example.tensors
    batch = next(iter(tensors.values())).shape[0]
    pick = torch.arange(size) % batch
    return example.with_tensors(
        {n: x[pick.to(x.device)] for n, x in tensors.items() if x.ndim and x.shape[0] == batch}
    )


def _memory(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
