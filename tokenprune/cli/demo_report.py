"""Results of the demo: as tables, as an HTML report and as JSON."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenprune.cost.profile import Profile
from tokenprune.cost.timing import Timing
from tokenprune.recipe.counting import counts_in_words
from tokenprune.report.html import Bars, Picture, Text, write_html
from tokenprune.report.table import Table

__all__ = ["Figures", "accuracy_table", "settings_table", "speed_table", "write"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One run of the demo."""

    images: int  # held out
    accuracy: Mapping[str, float]  # in [0, 1], "dense", "pruned" and "fine-tuned, nothing pruned"
    counted: Profile
    num_keep: tuple[int, ...]  # K of each stage
    timings: Mapping[int, Mapping[str, Timing]]  # of batch sizes, "dense" and "pruned"
    rounds: int  # each timing is the median of this many
    threads: int  # of torch
    device: str
    seconds: Mapping[str, float]  # part of the run -> its duration

    def speed(self, batch: int) -> tuple[float, float]:
        """Images per second, dense and pruned."""
        dense, pruned = (self.timings[batch][name] for name in ("dense", "pruned"))
        return dense.per_second(batch), pruned.per_second(batch)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a file."""
        rates = {str(batch): self.speed(batch) for batch in self.timings}
        return {
            "held_out_images": self.images,
            "accuracy": dict(self.accuracy),
            "gmacs": {"dense": self.counted.dense_gmacs, "pruned": self.counted.gmacs},
            "images_per_second": {
                batch: {"dense": dense, "pruned": pruned, "speedup": pruned / dense}
                for batch, (dense, pruned) in rates.items()
            },
            "patch_tokens": {"before": self.counted.patches_per_stage, "kept": self.num_keep},
            "rounds": self.rounds,
            "threads": self.threads,
            "device": self.device,
            "seconds": dict(self.seconds),
        }


def accuracy_table(figures: Figures) -> Table:
    """Dense against pruned: the result of the demo."""

    def accuracy(of: str) -> str:
        right = figures.accuracy[of]
        return f"{100 * right:.2f} % ({round(right * figures.images)} of {figures.images})"

    batch, counted = max(figures.timings), figures.counted
    dense, pruned = figures.speed(batch)
    patches = counted.patches_per_stage
    before, after = str(patches[0]), counts_in_words(patches, figures.num_keep)
    points = 100 * (figures.accuracy["pruned"] - figures.accuracy["dense"])
    cost = f"{100 * (counted.ratio - 1):+.1f} %"
    rows = (
        ("dense host", accuracy("dense"), f"{counted.dense_gmacs:.5f}", f"{dense:.0f}", before),
        ("pruned", accuracy("pruned"), f"{counted.gmacs:.5f}", f"{pruned:.0f}", after),
        ("change", f"{points:+.2f} points", cost, f"{pruned / dense:.2f}x", ""),
    )
    note = (
        f"Accuracy on {figures.images} held-out digits. GMACs of one image. "
        f"Images/s at batch {batch}:\nmedian of {figures.rounds} interleaved rounds, "
        f"{figures.threads} threads. The fine-tuned model without pruning: "
        f"{accuracy('fine-tuned, nothing pruned')}."
    )
    columns = ("", "accuracy", "GMACs", "images/s", "patch tokens")
    return Table("Dense and pruned", columns, rows, note)


def speed_table(figures: Figures) -> Table:
    """Images per second at each batch size."""
    rows = []
    for batch, timing in figures.timings.items():
        dense, pruned = figures.speed(batch)
        spread = f"{100 * max(timing[name].spread for name in ('dense', 'pruned')):.0f} %"
        gain = f"{pruned / dense:.2f}x"
        rows.append((str(batch), f"{dense:.0f}", f"{pruned:.0f}", gain, spread))
    bound = 1 / figures.counted.ratio
    note = f"Bound by GMACs: {bound:.2f}x. Spread: largest distance of a round from the median."
    columns = ("batch", "dense, images/s", "pruned, images/s", "gain", "spread")
    return Table("Speed", columns, tuple(rows), note)


def settings_table(figures: Figures) -> Table:
    """Versions, machine and durations."""
    rows = [
        *((name, version(name)) for name in ("torch", "timm", "transformers")),
        ("machine", f"{platform.machine()}, {figures.threads} threads"),
        ("device", figures.device),
    ]
    rows += [(f"time: {part}", f"{seconds:.0f} s") for part, seconds in figures.seconds.items()]
    rows.append(("time: all", f"{sum(figures.seconds.values()):.0f} s"))
    return Table("This run", ("", "found"), tuple(rows))


def write(path: Path, counted: Profile, tables: Sequence[Table], picture: Path) -> Path:
    """Write the HTML report."""
    blocks = zip(counted.blocks, counted.macs_per_block, counted.dense_macs_per_block, strict=True)
    bars = tuple(
        (name, macs / 1e6, dense / 1e6, f"{macs / 1e6:.2f} of {dense / 1e6:.2f} MMACs")
        for name, macs, dense in blocks
    )
    first, *rest = tables
    page: list[Text | Table | Picture | Bars] = [
        Text(
            "A small vision transformer was trained on scikit-learn's digits, wrapped with a "
            "DynamicViT recipe, and fine-tuned. Everything below was measured in that run."
        ),
        first,
        Picture(
            "Kept patches",
            picture.read_bytes(),
            "Held-out digits, one per row; one column per stage. Dropped patches are dimmed.",
        ),
        Bars("Cost of each block", bars, "Strong colour: pruned. Pale: dense."),
        *rest,
    ]
    return write_html(path, "tokenprune demo", page)
