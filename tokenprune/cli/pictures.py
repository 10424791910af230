"""Pictures for the command line: images traced, and written as PNG or HTML."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.cli.opened import Opened
from tokenprune.errors import PlanError
from tokenprune.hosts.inputs import draw_inputs
from tokenprune.report.html import Bars, Picture, Text, write_html
from tokenprune.report.table import Table
from tokenprune.report.visualize import pruning_grid
from tokenprune.rewrite.kept.pruning_trace import PruningTrace
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.state import in_mode

__all__ = ["check_ending", "picture_of", "trace_of", "write_picture"]

ENDINGS = (".png", ".html")


def trace_of(model: Any, images: Tensor) -> tuple[Any, PruningTrace]:
    """Output and trace of a wrapped model on images, in eval mode; other inputs are drawn."""
    from tokenprune.cli.runs import image_argument

    name, pruning = image_argument(model), pruning_of(model)
    device = next(model.parameters()).device
    with in_mode(model, training=False), torch.no_grad():
        if name is None or len(pruning.spec.inputs) == 1:
            return model(images.to(device), return_trace=True)  # type: ignore[no-any-return]
        others = draw_inputs(pruning.spec, pruning.host, len(images))
        return model(**{**others, name: images.to(device)}, return_trace=True)  # type: ignore[no-any-return]


def picture_of(opened: Opened, files: Sequence[Path], tile: int) -> tuple[Any, PruningTrace]:
    """A `PIL.Image.Image` of image files, each `tile` pixels wide or high, and their trace.

    Raises:
        HostError: The model takes no images.
        DataError: A file is no image.
    """
    from tokenprune.cli.runs import read_images

    images, pixels = read_images(files, **opened.image_settings())
    _, trace = trace_of(opened.model, images)
    labels = [file.name for file in files]
    return pruning_grid(pixels, trace, labels=labels, tile=tile), trace


def check_ending(path: Path) -> None:
    """Raise `PlanError` unless a picture can be written to a file of this name."""
    if path.suffix.lower() not in ENDINGS:
        raise PlanError(
            f"Asked to write {str(path)!r}, whose ending is {path.suffix or 'missing'!r}. Pictures "
            f"are written as {' or '.join(ENDINGS)}; name such a file with --output."
        )


def write_picture(path: Path, picture: Any, trace: PruningTrace, model: Any) -> Path:
    """Write a PNG, or an HTML page with the picture and a table of the stages, by the ending."""
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        picture.save(path, format="PNG")
        return path
    data = BytesIO()
    picture.save(data, format="PNG")
    pruning = pruning_of(model)
    merged = any(stage.groups is not None for stage in trace.stages)
    how = "merged into groups" if merged else "dropped"
    said = (
        f"Which patches of each image {type(pruning.host).__name__} keeps, and which are {how}, by "
        f"the recipe {pruning.recipe.name or 'given'!r}."
    )
    shown = "One image after the other, a column for each stage. Dimmed patches are " + (
        "those that joined another one. Below, each group is painted in the mean colour of its "
        "pixels; lines are borders between groups."
        if merged
        else "dropped."
    )
    blocks: list[Text | Table | Picture | Bars] = [
        Text(said),
        Picture("Patches", data.getvalue(), shown),
        _stages(trace, pruning),
    ]
    return write_html(path, "What became of the patches", blocks)


def _stages(trace: PruningTrace, pruning: Any) -> Table:
    rows = []
    for number, stage in enumerate(trace.stages):
        kept = stage.decision.detach().float().sum(1)
        row = [str(number), pruning.spec.blocks[pruning.plan.blocks[number]]]
        row += [str(stage.decision.shape[1]), f"{float(kept.mean()):.4g}"]
        row.append("" if stage.sizes is None else f"{float(stage.sizes.max()):.0f}")
        rows.append(tuple(row))
    columns = ("stage", "block", "patches", "tokens left, mean", "largest group")
    note = (
        f"Of {len(trace.stages[0].decision)} image(s). Prefix tokens, such as [CLS], come on top."
    )
    return Table("Stages", columns, tuple(rows), note)
