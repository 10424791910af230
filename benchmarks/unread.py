"""What it saves not to compute rows that nobody reads: a part of docs/speed.md.

    OMP_NUM_THREADS=1 python -m benchmarks.unread

DeiT-S dense against `exact`, and `merge-k0.7` without and with `unread_rows`, interleaved.
"""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch

import tokenprune
from benchmarks.markdown import put, table
from tokenprune.cost.timing import interleaved
from tokenprune.recipe import load_recipe

__all__ = ["main"]

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
HOST = "deit_small_patch16_224"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    dense = timm.create_model(HOST).eval()
    merged = load_recipe("merge-k0.7")
    reads = merged.model_copy(update={"unread_rows": True})
    wrapped = [tokenprune.wrap(dense, way, train=False) for way in ("exact", merged, reads)]
    exact, plain, narrow = wrapped
    macs = [tokenprune.profile(model).macs for model in wrapped]
    whole = tokenprune.profile(exact).dense_macs
    rows = []
    for batch in options.batch:
        images = torch.randn(batch, 3, 224, 224)
        models = {"dense": dense, "exact": exact, "merged": plain, "merged, unread": narrow}
        calls = {name: _call(model, images) for name, model in models.items()}
        found = interleaved(calls, rounds=options.rounds, turn_seconds=0.0)
        for name, before, after, saved in (
            ("`exact` against dense", "dense", "exact", 1 - macs[0] / whole),
            ("`merge-k0.7`, with `unread_rows` against without", "merged", "merged, unread",
             1 - macs[2] / macs[1]),
        ):  # fmt: skip
            pairs = zip(found[before].rounds, found[after].rounds, strict=True)
            ratios = sorted(slow / fast for slow, fast in pairs)
            middle = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
            rows.append(
                [name, str(batch), f"{100 * saved:.1f} %", f"{1e3 * found[before].seconds:.0f}",
                 f"{1e3 * found[after].seconds:.0f}",
                 f"{median(ratios):.3f}x ({middle[0]:.2f} to {middle[1]:.2f})"]
            )  # fmt: skip
    head = ["DeiT-S", "batch", "MACs saved", "before, ms", "after, ms", "speed-up (quartiles)"]
    threads, version = torch.get_num_threads(), torch.__version__.partition("+")[0]
    text = (
        f"`unread_rows` ([recipes](recipes.md)): {platform.machine()}, {threads} threads, float32, "
        f"torch {version}, median of {options.rounds} interleaved rounds, other work on the "
        f"machine; made by `OMP_NUM_THREADS={threads} python -m benchmarks.unread`.\n"
    )
    put(PAGE, "unread", f"{text}\n{table(head, rows)}\n")


def _call(model: Any, images: torch.Tensor) -> Any:
    def call() -> None:
        with torch.no_grad():
            model(images)

    return call


if __name__ == "__main__":
    main()
