"""`tokenprune visualize`: which patches a model keeps, and which it merges."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tokenprune.cli.console import say, working
from tokenprune.cli.hosts import host_of_folder
from tokenprune.cli.options import HostName, Images, KeepRatio, RecipeName, Threshold
from tokenprune.cli.pictures import check_ending, open_images, picture_of, trace_of, write_picture
from tokenprune.errors import HostError
from tokenprune.report.visualize import pruning_grid
from tokenprune.rewrite.kept.pruning_trace import PruningTrace

__all__ = ["draw", "drawn", "visualize"]


def visualize(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that `tokenprune train` or `tokenprune.save` wrote; or a model to "
            "build: timm:NAME, transformers:CLASS, :TYPE or :CHECKPOINT."
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files. Default: held-out images of the training run."),
    ] = None,
    data: Images = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A .png, or an .html page. Default: pruning.png in the folder."
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many held-out images.")] = 8,
    tile: Annotated[int, typer.Option(min=16, help="Side of an image, in pixels.")] = 112,
    keep_ratio: KeepRatio = "",
    threshold: Threshold = None,
    recipe: RecipeName = "",
    host: HostName = "",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="KEY=VALUE for building the host; may be repeated."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Build a model with the published weights.")
    ] = False,
    host_weights: Annotated[
        Path | None, typer.Option(help="Build a model with these weights of the dense host.")
    ] = None,
) -> None:
    """Draw images at each stage: dropped patches are dimmed, merged ones painted by group."""
    from tokenprune.cli.runs import prune_by, reopen

    is_folder = Path(model).is_dir()
    target = output or (Path(model) if is_folder else Path()) / "pruning.png"
    check_ending(target)
    if image and data is not None:
        raise HostError("Give image files or --data, not both.")
    if not image and not is_folder and not Path(model).exists():
        raise HostError(
            f"Asked to draw {model!r}, which is no folder of a training run, without images. Name "
            f"image files: tokenprune visualize {model} cat.png dog.png -o out.png"
        )
    for_a_name = {"--recipe": recipe, "--pretrained": pretrained, "--host-weights": host_weights}
    clash = next((name for name, value in for_a_name.items() if value), None)
    if is_folder and clash is not None:
        raise HostError(
            f"{clash} is for building a model by name; {model!r} is a folder, and holds its own "
            "recipe and weights. Leave the option out."
        )
    if image:
        with working("loading"):
            opened = open_images(
                model,
                image,
                recipe=recipe,
                host=host,
                options=option or (),
                pretrained=pretrained,
                host_weights=host_weights,
            )
            prune_by(opened.model, keep_ratio, threshold)
        wrapped = opened.model
        with working("drawing"):
            picture, trace = picture_of(opened, tile)
    else:
        with working("loading"):
            run = reopen(Path(model), data, host_of_folder(host, option or ()))
            prune_by(run.model, keep_ratio, threshold)
        wrapped = run.model
        with working("drawing"):
            picture, trace = drawn(wrapped, run.data, count, tile)
    say(f"picture   {write_picture(target, picture, trace, wrapped)}")


def draw(model: nn.Module, data: Any, count: int, tile: int = 112) -> Any:
    """A picture of evenly spaced held-out images, each `tile` pixels wide or high, and of the
    patches that the model keeps."""
    return drawn(model, data, count, tile)[0]


def drawn(model: nn.Module, data: Any, count: int, tile: int) -> tuple[Any, PruningTrace]:
    """`draw`, and the trace."""
    from tokenprune.losses.logits import class_logits

    total = len(data.eval)
    count = min(count, total)
    items = [data.eval[total * number // count] for number in range(count)]
    images = torch.stack([item["pixel_values"] for item in items])
    output, trace = trace_of(model, images)
    guesses = class_logits(output, data.num_classes).argmax(1).tolist()
    names, pairs = data.class_names, zip(items, guesses, strict=True)
    labels = [f"{names[item['labels']]}, predicted {names[guess]}" for item, guess in pairs]
    return pruning_grid(data.to_pixels(images), trace, labels=labels, tile=tile), trace
