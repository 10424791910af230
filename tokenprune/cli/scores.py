"""Accuracy and cost of a wrapped model's paths, as a table."""

from collections.abc import Sequence

from torch import nn

from tokenprune.cost.image_macs import ImageMacs
from tokenprune.cost.profile import profile
from tokenprune.report.table import Table
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.model import pruning_of
from tokenprune.train import DataBundle, evaluate, kept_tokens

__all__ = ["score_table"]


def score_table(
    model: nn.Module,
    data: DataBundle,
    paths: Sequence[Path] = ("dense", "gather"),
    batch_size: int = 256,
) -> Table:
    """Evaluate paths of a wrapped model on the held-out images."""
    counted = profile(model)
    pruned, note = f"{counted.gmacs:.4g}", ""
    if "gather" in paths and pruning_of(model).budget.threshold is not None:
        costs = ImageMacs(model)(kept_tokens(model, data, batch_size)) / 1e9
        pruned = f"{costs.mean():.4g}"
        note = f"mean of images that cost {costs.min():.4g} to {costs.max():.4g} GMACs"
    known = {
        "gather": ("pruned (gather)", pruned),
        "mask": ("pruned (mask)", "more than dense"),
        "dense": ("nothing pruned", f"{counted.dense_gmacs:.4g}"),
    }
    rows = []
    for path in paths:
        name, gmacs = known[path]
        accuracy = evaluate(model, data, path=path, batch_size=batch_size)
        rows.append((name, f"{100 * accuracy:.2f} %", gmacs))
    title = f"{len(data.eval)} held-out images of {data.name}"  # type: ignore[arg-type]
    return Table(title, ("path", "accuracy", "GMACs"), tuple(rows), note)
