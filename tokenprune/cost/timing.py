"""Time several functions against each other on a machine that does other things too.

They take turns, in another order each round, so that a slow moment hits all of them; the median
over the rounds leaves it out.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

__all__ = ["Timing", "interleaved"]


@dataclass(frozen=True)
class Timing:
    """What one function took."""

    rounds: tuple[float, ...]  # seconds per call, the mean of each round's turn

    @property
    def seconds(self) -> float:
        """Median seconds per call."""
        return median(self.rounds)

    @property
    def spread(self) -> float:
        """Largest distance of a round from the median, relative to it."""
        return max(abs(seconds - self.seconds) for seconds in self.rounds) / self.seconds

    def per_second(self, count: int) -> float:
        """Items per second, for calls that deal with `count` each."""
        return count / self.seconds


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    turn_seconds: float = 0.5,
    device: torch.device | str = "cpu",
    after_round: Callable[[int], Any] | None = None,
) -> dict[str, Timing]:
    """Time each of `calls`.

    Args:
        calls: Name -> function; each is called once first, to warm up.
        rounds: How often each has its turn.
        turn_seconds: A turn repeats its call until this has passed; one call at least.
        device: Where they compute; an accelerator is waited for.
        after_round: Called with the number of each finished round, for a progress bar.
    """
    if not calls or rounds < 1:
        raise ValueError(f"interleaved needs a call and a round, got {len(calls)} and {rounds}.")
    on = torch.device(device)
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        for name in names:
            found[name].append(_turn(calls[name], turn_seconds, on))
        names = [*names[1:], names[0]]
        if after_round is not None:
            after_round(number)
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def _turn(call: Callable[[], Any], turn_seconds: float, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    repeats, passed = 0, 0.0
    while not repeats or passed < turn_seconds:
        call()
        _wait(device)
        repeats += 1
        passed = time.perf_counter() - started
    return passed / repeats


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
