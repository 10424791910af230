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
    """One run of the demo.

    Attributes:
        images: Number of held-out images.
        dense_accuracy: Accuracy of the dense host before pruning, in [0, 1].
        pruned_accuracy: Accuracy of the fine-tuned model on the gather path.
        unpruned_accuracy: Accuracy of the fine-tuned model on the dense path.
        gmacs: 10^9 multiply-accumulates of one image, pruned.
        dense_gmacs: The same for the dense host.
        patches_per_stage: N of each stage.
        num_keep: K of each stage.
        timings: Batch size -> "dense" and "pruned" -> timing of a forward.
        rounds: Each timing is the median of this many.
        threads: Of torch.
        device: Where the models ran.
        seconds: Part of the run -> its duration.
    """

    images: int
    dense_accuracy: float
    pruned_accuracy: float
    unpruned_accuracy: float
    gmacs: float
    dense_gmacs: float
    patches_per_stage: tuple[int, ...]
    num_keep: tuple[int, ...]
    timings: Mapping[int, Mapping[str, Timing]]
    rounds: int
    threads: int
    device: str
    seconds: Mapping[str, float]

    def speed(self, batch: int) -> tuple[float, float]:
        """Images per second, dense and pruned."""
        dense, pruned = (self.timings[batch][name] for name in ("dense", "pruned"))
        return dense.per_second(batch), pruned.per_second(batch)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a file."""
        rates = {str(batch): self.speed(batch) for batch in self.timings}
        return {
            "held_out_images": self.images,
            "accuracy": {
                "dense": self.dense_accuracy,
                "pruned": self.pruned_accuracy,
                "fine-tuned, nothing pruned": self.unpruned_accuracy,
            },
            "gmacs": {"dense": self.dense_gmacs, "pruned": self.gmacs},
            "images_per_second": {
                batch: {"dense": dense, "pruned": pruned, "speedup": pruned / dense}
                for batch, (dense, pruned) in rates.items()
            },
            "patch_tokens": {"before": self.patches_per_stage, "kept": self.num_keep},
            "rounds": self.rounds,
            "threads": self.threads,
            "device": self.device,
            "seconds": dict(self.seconds),
        }


def accuracy_table(figures: Figures) -> Table:
    """Dense against pruned: the result of the demo."""
    batch = max(figures.timings)
    dense, pruned = figures.speed(batch)
    tokens = counts_in_words(figures.patches_per_stage, figures.num_keep)
    rows = (
        (
            "dense host",
            _accuracy(figures.dense_accuracy, figures.images),
            f"{figures.dense_gmacs:.5f}",
            f"{dense:.0f}",
            str(figures.patches_per_stage[0]),
        ),
        (
            "pruned",
            _accuracy(figures.pruned_accuracy, figures.images),
            f"{figures.gmacs:.5f}",
            f"{pruned:.0f}",
            tokens,
        ),
        (
            "change",
            f"{100 * (figures.pruned_accuracy - figures.dense_accuracy):+.2f} points",
            f"{100 * (figures.gmacs / figures.dense_gmacs - 1):+.1f} %",
            f"{pruned / dense:.2f}x",
            "",
        ),
    )
    note = (
        f"Accuracy on {figures.images} held-out digits. GMACs of one image. "
        f"Images/s at batch {batch}:\nmedian of {figures.rounds} interleaved rounds, "
        f"{figures.threads} threads. The fine-tuned model without pruning: "
        f"{_accuracy(figures.unpruned_accuracy, figures.images)}."
    )
    columns = ("", "accuracy", "GMACs", "images/s", "patch tokens")
    return Table("Dense and pruned", columns, rows, note)


def speed_table(figures: Figures) -> Table:
    """Images per second at each batch size."""
    rows = []
    for batch, timing in figures.timings.items():
        dense, pruned = figures.speed(batch)
        spread = max(timing[name].spread for name in ("dense", "pruned"))
        rows.append(
            (
                str(batch),
                f"{dense:.0f}",
                f"{pruned:.0f}",
                f"{pruned / dense:.2f}x",
                f"{100 * spread:.0f} %",
            )
        )
    bound = figures.dense_gmacs / figures.gmacs
    note = f"Bound by GMACs: {bound:.2f}x. Spread: largest distance of a round from the median."
    columns = ("batch", "dense, images/s", "pruned, images/s", "gain", "spread")
    return Table("Speed", columns, tuple(rows), note)


def settings_table(figures: Figures) -> Table:
    """Versions, machine and durations."""
    rows = [
        ("torch", version("torch")),
        ("timm", version("timm")),
        ("transformers", version("transformers")),
        ("machine", f"{platform.machine()}, {figures.threads} threads"),
        ("device", figures.device),
    ]
    rows += [(f"time: {part}", f"{seconds:.0f} s") for part, seconds in figures.seconds.items()]
    rows.append(("time: all", f"{sum(figures.seconds.values()):.0f} s"))
    return Table("This run", ("", "found"), tuple(rows))


def write(
    path: Path, figures: Figures, counted: Profile, tables: Sequence[Table], picture: Path
) -> Path:
    """Write the HTML report."""
    bars = tuple(
        (name, macs / 1e6, dense / 1e6, f"{macs / 1e6:.2f} of {dense / 1e6:.2f} MMACs")
        for name, macs, dense in zip(
            counted.blocks, counted.macs_per_block, counted.dense_macs_per_block, strict=True
        )
    )
    first, *rest = tables
    blocks: list[Text | Table | Picture | Bars] = [
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
    return write_html(path, "tokenprune demo", blocks)


def _accuracy(share: float, images: int) -> str:
    return f"{100 * share:.2f} % ({round(share * images)} of {images})"
