"""Accuracy and cost of a wrapped model's paths."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokenprune.cli.console import Step
from tokenprune.cost.image_macs import ImageMacs
from tokenprune.cost.profile import profile
from tokenprune.report.table import Table
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.model import pruning_of
from tokenprune.train import DataBundle, evaluate, kept_tokens

__all__ = ["scores"]


def scores(
    model: nn.Module,
    data: DataBundle,
    paths: Sequence[Path] = ("dense", "gather"),
    batch_size: int = 256,
    *,
    progress: Step,
) -> tuple[dict[str, Any], Table]:
    """Evaluate paths of a wrapped model on the held-out images: as plain data, and as a table."""
    counted = profile(model)
    images = len(data.eval)  # type: ignore[arg-type]
    gmacs: dict[str, Any] = {"gather": counted.gmacs, "mask": None, "dense": counted.dense_gmacs}
    note = ""
    if "gather" in paths and pruning_of(model).budget.threshold is not None:
        costs = ImageMacs(model)(kept_tokens(model, data, batch_size)) / 1e9
        gmacs["gather"] = float(costs.mean())
        note = f"mean of images that cost {costs.min():.4g} to {costs.max():.4g} GMACs"
    named = {"gather": "pruned (gather)", "mask": "pruned (mask)", "dense": "nothing pruned"}
    rows, found = [], []
    for number, path in enumerate(paths):

        def step(done: int, before: int = number * images) -> None:
            progress(before + done, len(paths) * images, {})

        accuracy = evaluate(model, data, path=path, batch_size=batch_size, progress=step)
        cost = gmacs[path]
        rows.append(
            (
                named[path],
                f"{100 * accuracy:.2f} %",
                "more than dense" if cost is None else f"{cost:.4g}",
            )
        )
        found.append({"path": path, "accuracy": accuracy, "gmacs": cost})
    table = Table(
        f"{images} held-out images of {data.name}",
        ("path", "accuracy", "GMACs"),
        tuple(rows),
        note,
    )
    return {"images": images, "data": data.name, "paths": found}, table
