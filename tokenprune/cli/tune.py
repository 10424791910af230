"""`tokenprune compare` and `tokenprune calibrate`: what methods lose on one's own images, and the
schedule that loses least."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tokenprune.cli.console import progress, report, working
from tokenprune.cli.hosts import host_section, is_function
from tokenprune.cli.opened import Opened, open_model
from tokenprune.cli.options import (
    HostName,
    HostWeights,
    Json,
    ModelName,
    Options,
    Pretrained,
    Settings,
    output,
)
from tokenprune.errors import CheckpointError, HostError, PlanError
from tokenprune.runtime.model import PrunedModel
from tokenprune.wrapping import wrap

__all__ = ["calibrate", "compare"]

Data = Annotated[
    str | None, typer.Option(help="Folder of images. Default: those of the training run, digits.")
]
Count = Annotated[int, typer.Option(min=1, help="Images to try on, spread over those there are.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward.")]
Batch = tuple[torch.Tensor, ...]
RECIPE = "merge-k0.7"


def _open(name: str, given: Sequence[str], **how: Any) -> Opened:
    return open_model(name, given, wrapped=False, **how)


def _batches(opened: Opened, data: str | None, count: int, batch_size: int) -> list[Batch]:
    """Images, with labels if the classes of the images are the model's."""
    from tokenprune.cli.runs import held_out_images
    from tokenprune.train.data import load_data

    if opened.folder is not None:
        bundle, labelled = held_out_images(opened.folder, opened.model, data)[0], True
    else:
        bundle = load_data(data, **opened.image_settings(), held_out=1.0)
        labelled = _classes(opened.model) == bundle.num_classes
    images: Any = bundle.eval
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().int().tolist()
    items = [images[number] for number in chosen]
    batches: list[Batch] = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        pixels = torch.stack([item["pixel_values"] for item in part])
        labels = torch.tensor([int(item["labels"]) for item in part])
        batches.append((pixels, labels) if labelled else (pixels,))
    return batches


def _classes(model: nn.Module) -> Any:
    """Outputs of a host's head, as timm and transformers say it."""
    found = getattr(model, "num_classes", None)
    return getattr(getattr(model, "config", None), "num_labels", None) if found is None else found


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"--macs is one share of the dense MACs, or several with commas, found {text!r}. Give "
            "--macs 0.8,0.65."
        ) from None


def compare(
    model: ModelName,
    setting: Settings = None,
    data: Data = None,
    macs: Annotated[
        str, typer.Option(help="Shares of the dense MACs, with commas.")
    ] = "0.8,0.65,0.5",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Such as merge-k0.7; may be repeated. Default: all without training."),
    ] = None,
    images: Count = 512,
    picture: Annotated[Path | None, output("Picture to write: .png, .svg or .pdf.")] = None,
    timed: Annotated[bool, typer.Option(help="Also measure time.")] = True,
    host: HostName = "",
    option: Options = None,
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Prune a model by several methods, without training, and show what each costs and loses."""
    from tokenprune.tune.compare import compare as run

    shares = _shares(macs)
    given = [*(setting or ()), *(option or ())]
    opened = _open(model, given, host=host, pretrained=pretrained, host_weights=host_weights)
    with working("reading images"):
        batches = _batches(opened, data, images, batch_size)
    asked: dict[str, Any] = {"methods": method or None, "macs": shares, "timed": timed}
    with progress("comparing") as step:
        found = run(opened.model, batches, **asked, progress=step)
    advice = {share: found.advice(share) for share in shares}
    lines = []
    for share, text in advice.items():
        lines.append(f"Least is lost at {share:g} of the MACs by {found.best(share).method}:")
        lines += [f"    {line}" for line in text.splitlines()]
    if picture is not None:
        lines.append(f"wrote {found.plot(picture)}")
    report(as_json, {**asdict(found), "advice": advice}, found.table(), *lines)


def _described(opened: Opened, given: Sequence[str]) -> dict[str, Any] | None:
    """The `host` section of a host that was built by name; None if there is none that says it."""
    if opened.folder is not None or is_function(opened.name) or Path(opened.name).exists():
        return None
    try:
        return host_section(opened.name, given).model_dump()
    except HostError:  # options that a recipe does not hold, such as a mapping
        return None


def calibrate(
    model: ModelName,
    folder: Annotated[Path, output("Folder for the calibrated model.")],
    setting: Settings = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Of a model to build: a name or file.")
    ] = "",
    data: Data = None,
    macs: Annotated[
        float | None, typer.Option(help="Share of the dense MACs. Default: what it costs now.")
    ] = None,
    images: Count = 512,
    trials: Annotated[int, typer.Option(min=1, help="Schedules to try.")] = 24,
    seed: Annotated[int, typer.Option(help="Of what is tried.")] = 0,
    host: HostName = "",
    option: Options = None,
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Spend a budget where a model loses least on images without labels, and save the model."""
    from tokenprune.checkpoints.directory import save
    from tokenprune.cli.run_input import copy_input
    from tokenprune.tune.calibrate import calibrate as run

    given = [*(setting or ()), *(option or ())]
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"Cannot save to {str(folder)!r}: it is a file. Name a directory.")
    opened = _open(model, given, host=host, pretrained=pretrained, host_weights=host_weights)
    wrapped, described = opened.model, _described(opened, given)
    if isinstance(wrapped, PrunedModel) and recipe:
        raise HostError(
            f"--recipe is for building a model by name; {model!r} has its own. Leave --recipe out."
        )
    with working("reading images"):
        batches = _batches(opened, data, images, batch_size)
    if not isinstance(wrapped, PrunedModel):
        with working("tracing and proving"):
            first = batches[0][0][:2]
            wrapped = wrap(wrapped, recipe or RECIPE, example_inputs=first, train=False)
    resume = folder / "calibration.json"
    folder.mkdir(parents=True, exist_ok=True)
    with progress("calibrating") as step:
        options: dict[str, Any] = {"trials": trials, "seed": seed, "resume": resume}
        found = run(wrapped, batches, macs, **options, progress=step)
    save(wrapped, folder, host=described)
    if opened.folder is not None:
        copy_input(opened.folder, folder)
    resume.unlink(missing_ok=True)  # of no use to a calibration that is saved
    data_found = {**asdict(found), "recipe": found.recipe.model_dump(mode="json")}
    report(as_json, {**data_found, "folder": folder}, found.table(), f"saved {folder}")
