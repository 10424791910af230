"""`tokenprune compare` and `tokenprune calibrate`: what methods lose on one's own images, and the
schedule that loses least."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from tokenprune.cli.console import say, show, working
from tokenprune.cli.hosts import build, host_of_folder, host_section
from tokenprune.cli.options import HostName, Options
from tokenprune.errors import PlanError

__all__ = ["calibrate", "compare"]

Model = Annotated[
    str, typer.Argument(help="A folder of `tokenprune train` or save; or a model to build.")
]
Data = Annotated[
    str | None, typer.Option(help="Folder of images. Default: those of the training run, digits.")
]
Count = Annotated[int, typer.Option(min=1, help="Images to try on, spread over those there are.")]
Pretrained = Annotated[bool, typer.Option(help="Load published weights into a model to build.")]
HostWeights = Annotated[Path | None, typer.Option(help="Weights of a model to build.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward.")]


class _Opened(NamedTuple):
    model: Any
    batches: list[tuple[Any, ...]]
    labelled: bool


def _open(
    name: str,
    data: str | None,
    count: int,
    batch_size: int,
    *,
    host: str,
    options: Sequence[str],
    pretrained: bool,
    host_weights: Path | None,
) -> _Opened:
    """A model, wrapped if it is of a folder, and batches of images, with labels if the classes of
    the images are the model's."""
    from tokenprune.cli.runs import image_settings, load_host_weights, reopen
    from tokenprune.train.data import load_data

    if Path(name).is_dir():
        run = reopen(Path(name), data, host_of_folder(host, options))
        model, bundle, labelled = run.model, run.data, True
    else:
        if host:
            raise PlanError(f"--host is for a folder, and {name!r} is none. Leave --host out.")
        model = build(name, options, pretrained=pretrained)
        if host_weights is not None:
            load_host_weights(model, host_weights)
        settings = image_settings(None, host_section(name, options), pretrained)
        bundle = load_data(data, **settings, held_out=1.0)
        labelled = _classes(model) == bundle.num_classes
    images: Any = bundle.eval
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().int().tolist()
    items = [images[number] for number in chosen]
    batches = []
    for start in range(0, len(items), batch_size):
        part = items[start : start + batch_size]
        pixels = torch.stack([item["pixel_values"] for item in part])
        labels = torch.tensor([int(item["labels"]) for item in part])
        batches.append((pixels, labels) if labelled else (pixels,))
    return _Opened(model.eval(), batches, labelled)


def _classes(model: Any) -> int | None:
    """Outputs of a host's head, as timm and transformers say it."""
    found = getattr(model, "num_classes", None)
    return getattr(getattr(model, "config", None), "num_labels", None) if found is None else found


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"--macs is one share of the dense MACs, or several with commas: 0.8,0.65; found "
            f"{text!r}."
        ) from None


def compare(
    model: Model,
    data: Data = None,
    macs: Annotated[
        str, typer.Option(help="Shares of the dense MACs, with commas.")
    ] = "0.8,0.65,0.5",
    method: Annotated[
        list[str] | None,
        typer.Option(help="Such as merge-k0.7; may be repeated. Default: all without training."),
    ] = None,
    images: Count = 512,
    output: Annotated[Path | None, typer.Option("--output", help="Picture to write.")] = None,
    timed: Annotated[bool, typer.Option(help="Also measure time.")] = True,
    host: HostName = "",
    option: Options = None,
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
    batch_size: BatchSize = 64,
) -> None:
    """Prune a model by several methods, without training, and show what each costs and loses."""
    from tokenprune.tune.compare import compare as run

    shares = _shares(macs)
    with working("loading"):
        opened = _open(
            *(model, data, images, batch_size),
            host=host,
            options=option or (),
            pretrained=pretrained,
            host_weights=host_weights,
        )
    found = run(
        opened.model,
        opened.batches,
        methods=method or None,
        macs=shares,
        timed=timed,
    )
    show(found.table())
    for share in shares:
        best = found.best(share)
        say(f"Least is lost at {share:g} of the MACs by {best.method}:")
        say(*(f"    {line}" for line in found.advice(share).splitlines()))
    if output is not None:
        say(f"wrote {found.plot(output)}")


def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", help="Folder for the calibrated model.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Of a model to build: a name or file.")
    ] = "merge-k0.7",
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
) -> None:
    """Spend a budget where a model loses least on images without labels, and save the model."""
    from tokenprune.checkpoints.directory import save
    from tokenprune.runtime.model import PrunedModel
    from tokenprune.tune.calibrate import calibrate as run
    from tokenprune.wrapping import wrap

    with working("loading"):
        opened = _open(
            *(model, data, images, batch_size),
            host=host,
            options=option or (),
            pretrained=pretrained,
            host_weights=host_weights,
        )
        wrapped = opened.model
        if not isinstance(wrapped, PrunedModel):
            first = opened.batches[0][0]
            wrapped = wrap(wrapped, recipe, example_inputs=first[:2], train=False)
    resume = output / "calibration.json"
    output.mkdir(parents=True, exist_ok=True)
    report = run(wrapped, opened.batches, macs, trials=trials, seed=seed, resume=resume)
    show(report.table())
    resume.unlink(missing_ok=True)  # of no use to a calibration that is done
    section = None if Path(model).is_dir() else host_section(model, option or ()).model_dump()
    save(wrapped, output, host=section)
    say(f"saved {output}")
