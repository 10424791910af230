"""Timing: calls take turns, and the median of the rounds counts."""

from typing import Any

import pytest

from tokenprune.cost import timing
from tokenprune.cost.timing import Timing, interleaved


class Clock:
    """Time that passes only when something is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, seconds: float) -> Any:
        def run() -> None:
            self.now += seconds

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_timing_takes_turns(clock: Clock) -> None:
    order: list[str] = []

    def spoken(name: str, seconds: float) -> Any:
        pass_time = clock.call(seconds)

        def run() -> None:
            order.append(name)
            pass_time()

        return run

    done: list[int] = []
    found = interleaved(
        {"a": spoken("a", 1.0), "b": spoken("b", 4.0)},
        rounds=3,
        turn_seconds=2.0,
        after_round=done.append,
    )
    assert "".join(order) == "ab" + "aab" + "baa" + "aab"
    assert (found["a"].seconds, found["b"].seconds) == (1.0, 4.0)
    assert done == [0, 1, 2]


def test_the_median_leaves_a_slow_moment_out() -> None:
    found = Timing((0.5, 0.5, 4.0))
    assert found.seconds == 0.5
    assert found.per_second(8) == 16
    assert found.spread == pytest.approx(7.0)


def test_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="got 0 and 7"):
        interleaved({})
    with pytest.raises(ValueError, match="got 1 and 0"):
        interleaved({"a": print}, rounds=0)
