"""What looking at the guards costs in a call of one image.

    OMP_NUM_THREADS=2 python -m benchmarks.guards

Calls with the guards and with `freeze_guards` are interleaved; the medians of both, of the check
alone, and its share of a call are printed.
"""

import time
from statistics import median

import torch
from torch import nn

import tokenprune
from benchmarks.speed_parts.hosts import HOSTS
from tokenprune.runtime.model import pruning_of

__all__ = ["main"]

ROUNDS = 60
NAMES = ("DeiT-S", "HF ViT-B")


def main() -> None:
    """Print a row for each host."""
    print("| host | checked, ms | frozen, ms | check, us | watched values | share |")
    print("|---|---|---|---|---|---|")
    for host in (host for host in HOSTS if host.name in NAMES):
        model = tokenprune.wrap(host.build(), host.recipe, verify=False, train=False).eval()
        print(_row(host.name, model, torch.randn(1, 3, 224, 224)))


@torch.no_grad()
def _row(name: str, model: nn.Module, image: torch.Tensor) -> str:
    model(image)
    guards = next(iter(pruning_of(model).cache)).guards
    spent: dict[bool, list[float]] = {True: [], False: []}
    alone = []
    for number in range(2 * ROUNDS):
        frozen = bool(number % 2)
        tokenprune.freeze_guards(model, frozen)
        started = time.perf_counter()
        model(image)
        spent[frozen].append(time.perf_counter() - started)
        started = time.perf_counter()
        guards.hold()
        alone.append(time.perf_counter() - started)
    checked, unchecked, check = median(spent[False]), median(spent[True]), median(alone)
    return (
        f"| {name} | {1e3 * checked:.1f} | {1e3 * unchecked:.1f} | {1e6 * check:.0f} | "
        f"{sum(1 for _ in guards)} | {100 * check / unchecked:.2f} % |"
    )


if __name__ == "__main__":
    main()
