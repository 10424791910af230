"""Measure one host, dense against wrapped, at several batch sizes, eager and compiled."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import tokenprune
from benchmarks.speed_parts.hosts import SpeedHost
from tokenprune.model import PrunedModel, pruning_of
from tokenprune.report.measure import interleaved

__all__ = ["How", "SpeedRow", "measure"]

How = Literal["eager", "compile"]
MOST_ROUNDS, FEWEST_ROUNDS = 15, 3
SHARE_ROUNDS = 3


@dataclass(frozen=True)
class SpeedRow:
    """One host at one batch size.

    Attributes:
        host: its name.
        columnar: tokens leave.
        how: eager, or `torch.compile` on both sides.
        batch: images in a forward.
        dense: median seconds of the dense host.
        pruned: median seconds of the wrapped one.
        speedup: median over the rounds of dense / pruned, each round's own.
        low: smallest of those ratios.
        high: largest.
        bound: dense MACs / pruned MACs.
        rounds: how many.
        outside: share of the pruned forward spent in tokenprune's own functions (predictors,
            selection, gathering); None where it was not measured.
    """

    host: str
    columnar: bool
    how: How
    batch: int
    dense: float
    pruned: float
    speedup: float
    low: float
    high: float
    bound: float
    rounds: int
    outside: float | None


def measure(
    host: SpeedHost, how: How, batches: tuple[int, ...], budget: float
) -> Iterator[SpeedRow]:
    """Rows of one host.

    Args:
        host: which.
        how: eager or compiled.
        batches: sizes.
        budget: seconds of measurement at each batch size, about.
    """
    torch.manual_seed(0)
    dense = host.build().eval()
    wrapped = tokenprune.wrap(copy.deepcopy(dense), host.recipe, verify=False).eval()
    counted = tokenprune.profile(wrapped)
    sides: dict[str, Callable[[Tensor], Any]] = {"dense": dense, "pruned": wrapped}
    if how == "compile":
        torch.compiler.reset()
        sides = {name: torch.compile(side, dynamic=True) for name, side in sides.items()}
    # the smallest last: a compiler takes a batch of 1 for a constant
    for batch in sorted(batches, reverse=True):
        images = torch.randn(batch, 3, host.size, host.size)
        with torch.inference_mode():
            calls = {name: partial(side, images) for name, side in sides.items()}
            outside = _outside(wrapped, images) if how == "eager" else None
            rounds = _rounds(calls, budget)
            timings = interleaved(calls, rounds=rounds, turn_seconds=0.3)
        slow, fast = timings["dense"], timings["pruned"]
        ratios = sorted(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))
        yield SpeedRow(
            *(host.name, host.columnar, how, batch),
            dense=slow.seconds,
            pruned=fast.seconds,
            speedup=ratios[len(ratios) // 2],
            low=ratios[0],
            high=ratios[-1],
            bound=counted.dense_macs / counted.macs,
            rounds=rounds,
            outside=outside,
        )


def _rounds(calls: dict[str, Callable[[], Any]], budget: float) -> int:
    for call in calls.values():
        call()
    started = time.perf_counter()
    for call in calls.values():
        call()
    once = max(time.perf_counter() - started, 0.6)
    return min(max(int(budget / once), FEWEST_ROUNDS), MOST_ROUNDS) | 1  # odd, for the median


def _outside(model: nn.Module, images: Tensor) -> float:
    """Share of a forward inside functions of this library that its program calls."""
    if not isinstance(model, PrunedModel):
        raise TypeError(f"{type(model).__name__} is not wrapped")
    model(images)
    shares = []
    for _ in range(SHARE_ROUNDS):
        spent = [0.0]
        with _watched(model, spent):
            started = time.perf_counter()
            model(images)
            shares.append(spent[0] / (time.perf_counter() - started))
    return sorted(shares)[SHARE_ROUNDS // 2]


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

    spaces = [p.get(model, "gather").run.__globals__ for p in pruning_of(model).programs.values()]
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
