"""Accuracy and cost of a wrapped model's paths, as a table."""

from collections.abc import Sequence

from torch import nn

from tokenprune.cost.image_macs import ImageMacs
from tokenprune.cost.profile import profile
from tokenprune.report.table import Table
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.model import pruning_of
from tokenprune.train import DataBundle, evaluate, kept_tokens

__all__ = ["PATH_NAMES", "score_table"]

PATH_NAMES: dict[Path, str] = {
    "gather": "pruned (gather)",
    "mask": "pruned (mask)",
    "dense": "nothing pruned",
}


def score_table(
    model: nn.Module,
    data: DataBundle,
    paths: Sequence[Path] = ("dense", "gather"),
    batch_size: int = 256,
) -> Table:
    """Evaluate a wrapped model on the held-out images.

    Args:
        model: What `wrap` returned.
        data: Its `eval` part is used.
        paths: To run.
        batch_size: Images per forward.
    """
    counted = profile(model)
    pruned, note = f"{counted.gmacs:.4g}", ""
    if "gather" in paths and pruning_of(model).budget.threshold is not None:
        costs = ImageMacs(model)(kept_tokens(model, data, batch_size)) / 1e9
        pruned = f"{costs.mean():.4g}"
        note = f"mean of images that cost {costs.min():.4g} to {costs.max():.4g} GMACs"
    gmacs = {
        "gather": pruned,
        "mask": "more than dense",
        "dense": f"{counted.dense_gmacs:.4g}",
    }
    rows = tuple(
        (
            PATH_NAMES[path],
            f"{100 * evaluate(model, data, path=path, batch_size=batch_size):.2f} %",
            gmacs[path],
        )
        for path in paths
    )
    images = len(data.eval)  # type: ignore[arg-type]
    title = f"{images} held-out images of {data.name}"
    return Table(title, ("path", "accuracy", "GMACs"), rows, note)
