"""Measure one host, dense against wrapped, at several batch sizes, in this process.

    python -m benchmarks.speed_parts.measure HOST eager|compile BUDGET BATCH...

is what `benchmarks.speed` runs in several processes, because processes differ more than the rounds
of one. Each sample is printed as a line of JSON.
"""

import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from benchmarks.speed_parts.hosts import HOSTS, SpeedHost
from tokenprune.cost.timing import interleaved
from tokenprune.runtime.model import PrunedModel, pruning_of

__all__ = ["Sample", "measure"]

MOST_ROUNDS, FEWEST_ROUNDS = 15, 3


@dataclass(frozen=True)
class Sample:
    """Measurements of one process for one host at one batch size.

    Attributes:
        batch: images in a forward.
        bound: dense MACs / pruned MACs.
        dense: seconds of the dense host in each round.
        pruned: seconds of the wrapped one in the same rounds.
        outside: share of the pruned forward in tokenprune's functions (predictors, selection,
            gathering); None under a compiler, which fuses them.
        dense_kernel: share of the dense host's CPU time spent in the operating system.
        pruned_kernel: the same of the wrapped one.
    """

    batch: int
    bound: float
    dense: tuple[float, ...]
    pruned: tuple[float, ...]
    outside: float | None
    dense_kernel: float
    pruned_kernel: float


def measure(
    host: SpeedHost, compiled: bool, batches: tuple[int, ...], budget: float
) -> Iterator[Sample]:
    """Samples of one host.

    Args:
        host: which.
        compiled: `torch.compile` on both sides.
        batches: sizes.
        budget: seconds of measurement at each batch size, about.
    """
    torch.manual_seed(0)
    dense = host.build().eval()
    wrapped = tokenprune.wrap(copy.deepcopy(dense), host.recipe, verify=False).eval()
    counted = tokenprune.profile(wrapped)
    sides: dict[str, Callable[[Tensor], Any]] = {"dense": dense, "pruned": wrapped}
    if compiled:
        sides = {name: torch.compile(side, dynamic=True) for name, side in sides.items()}
    # the smallest last: a compiler specializes a batch of 1
    for batch in sorted(batches, reverse=True):
        images = torch.randn(batch, 3, host.size, host.size)
        with torch.inference_mode():
            calls = {name: partial(side, images) for name, side in sides.items()}
            rounds = _rounds(calls, budget)
            outside = None if compiled else _outside(wrapped, images)
            metered = {name: _Metered(call) for name, call in calls.items()}
            timings = interleaved(metered, rounds=rounds, turn_seconds=0.3)
        yield Sample(
            batch=batch,
            bound=counted.dense_macs / counted.macs,
            dense=timings["dense"].rounds,
            pruned=timings["pruned"].rounds,
            outside=outside,
            dense_kernel=metered["dense"].kernel_share,
            pruned_kernel=metered["pruned"].kernel_share,
        )


class _Metered:
    """A function that measures the CPU time of its calls."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.kernel, self.own = call, 0.0, 0.0

    def __call__(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        self.call()
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.kernel += after.ru_stime - before.ru_stime
        self.own += after.ru_utime - before.ru_utime

    @property
    def kernel_share(self) -> float:
        """Share of the operating system."""
        return self.kernel / (self.kernel + self.own)


def _rounds(calls: Mapping[str, Callable[[], Any]], budget: float) -> int:
    for call in calls.values():
        call()
    started = time.perf_counter()
    for call in calls.values():
        call()
    once = max(time.perf_counter() - started, 0.6)
    return min(max(int(budget / once), FEWEST_ROUNDS), MOST_ROUNDS) | 1  # odd, for the median


def _outside(model: nn.Module, images: Tensor) -> float:
    """Share of a forward in the functions of this library that its program calls."""
    if not isinstance(model, PrunedModel):
        raise TypeError(f"{type(model).__name__} is not wrapped")
    spent = [0.0]
    with _watched(model, spent):
        started = time.perf_counter()
        model(images)
        return spent[0] / (time.perf_counter() - started)


@contextmanager
def _watched(model: PrunedModel, spent: list[float]) -> Iterator[None]:
    """Add up, in `spent[0]`, the seconds inside this library's functions."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    spaces = [p.get(model, "gather").run.__globals__ for p in list(pruning_of(model).cache)]
    was = [dict(space) for space in spaces]
    for space in spaces:
        for name, value in list(space.items()):
            if callable(value) and str(getattr(value, "__module__", "")).startswith("tokenprune."):
                space[name] = timed(value)
    try:
        yield
    finally:
        for space, before in zip(spaces, was, strict=True):
            space.update(before)


def _main(name: str, how: str, budget: str, *batches: str) -> None:
    host = next(host for host in HOSTS if host.name == name)
    for sample in measure(host, how == "compile", tuple(map(int, batches)), float(budget)):
        print(json.dumps(asdict(sample)), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
