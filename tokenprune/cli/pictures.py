"""Pictures for the command line: models and images by name, traced and written as PNG or HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.cli.hosts import build, host_of_folder, host_section, recipe_for
from tokenprune.errors import HostError, PlanError
from tokenprune.hosts.inputs import draw_inputs
from tokenprune.hosts.registry import describe
from tokenprune.recipe import load_recipe
from tokenprune.report.html import Bars, Picture, Text, write_html
from tokenprune.report.table import Table
from tokenprune.rewrite.kept.pruning_trace import PruningTrace
from tokenprune.runtime.model import pruning_of
from tokenprune.wrapping import wrap

__all__ = ["Opened", "check_ending", "open_images", "picture_of", "trace_of", "write_picture"]

ENDINGS = (".png", ".html")


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A wrapped model, images as it takes them, and the same as pixels in [0, 1]; each a tensor
    [B, C, height, width]. A label for each image."""

    model: Any
    images: Tensor
    pixels: Tensor
    labels: tuple[str, ...]


def open_images(
    name: str,
    files: Sequence[Path],
    *,
    recipe: str = "",
    host: str = "",
    options: Sequence[str] = (),
    pretrained: bool = False,
    host_weights: Path | None = None,
) -> Opened:
    """Images from files, and the model to draw.

    Args:
        name: A folder that `tokenprune train` or `tokenprune.save` wrote, or a model to build.
        files: Of the images.
        recipe: Name or file; for a model to build.
        host: Name of the host of a folder, where its recipe names none.
        options: KEY=VALUE for building the host.
        pretrained: Load the published weights into a model to build.
        host_weights: Weights of a model to build.

    Raises:
        HostError: The model takes no images, or --host is given for a model to build.
        DataError: A file is no image.
    """
    from tokenprune.cli.runs import image_settings, load_host_weights, read_images, reopen_model

    folder = Path(name)
    if folder.is_dir():
        section = host_of_folder(host, options)
        model = reopen_model(folder, section)
        settings = image_settings(folder, section)
    else:
        if host:
            raise HostError(f"--host is for a folder, and {name!r} is none. Leave --host out.")
        built = build(name, options, pretrained=pretrained)
        if host_weights is not None:
            load_host_weights(built, host_weights)
        spec = describe(built)
        chosen = load_recipe(recipe) if recipe else recipe_for(name, spec)
        model = wrap(built, chosen, adapter=spec, verify=False, train=False)
        settings = image_settings(None, host_section(name, options), pretrained)
    _image_argument(model)  # raises before files are read
    images, pixels = read_images(files, **settings)
    return Opened(model=model, images=images, pixels=pixels, labels=tuple(f.name for f in files))


def trace_of(model: Any, images: Tensor) -> tuple[Any, PruningTrace]:
    """Output and trace of a wrapped model on images, in eval mode; other inputs are drawn."""
    from tokenprune.tracing.state import in_mode

    name, pruning = _image_argument(model), pruning_of(model)
    device = next(model.parameters()).device
    with in_mode(model, training=False), torch.no_grad():
        if name is None or len(pruning.spec.inputs) == 1:
            return model(images.to(device), return_trace=True)  # type: ignore[no-any-return]
        others = draw_inputs(pruning.spec, pruning.host, len(images))
        return model(**{**others, name: images.to(device)}, return_trace=True)  # type: ignore[no-any-return]


def _image_argument(model: Any) -> str | None:
    """Name of the argument that takes images; None if the adapter does not know the arguments."""
    inputs = pruning_of(model).spec.inputs
    for name, example in inputs.items():
        if len(example.shape) == 3 and example.high is None:
            return name
    if not inputs:
        return None
    found = ", ".join(f"{name} {list(example.shape)}" for name, example in inputs.items())
    raise HostError(
        "Asked for a picture of what becomes of image patches, but "
        f"{type(pruning_of(model).host).__name__} takes no images: its inputs are {found}, without "
        "the batch. `tokenprune inspect` shows the token counts of any model as a table."
    )


def picture_of(opened: Opened, tile: int) -> tuple[Any, PruningTrace]:
    """A `PIL.Image.Image` of the images, each `tile` pixels wide or high, and their trace."""
    from tokenprune.report.visualize import pruning_grid

    _, trace = trace_of(opened.model, opened.images)
    return pruning_grid(opened.pixels, trace, labels=opened.labels, tile=tile), trace


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
