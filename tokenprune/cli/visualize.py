"""`tokenprune visualize`: which patches a model keeps, and which it merges."""

import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tokenprune.cli.console import say, working
from tokenprune.cli.opened import open_model
from tokenprune.cli.options import (
    AdapterName,
    HostName,
    HostWeights,
    Images,
    KeepRatio,
    ModelName,
    Options,
    Pretrained,
    RecipeName,
    Threshold,
    output,
)
from tokenprune.cli.pictures import check_ending, picture_of, trace_of, write_picture
from tokenprune.errors import HostError
from tokenprune.report.visualize import pruning_grid
from tokenprune.rewrite.kept.pruning_trace import PruningTrace

__all__ = ["draw", "drawn", "visualize"]

SETTING = re.compile(r"[A-Za-z_]\w*=")


def visualize(
    model: ModelName,
    image: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE|KEY=VALUE]...",
            help="Image files; default: held-out images of the training run. And settings for "
            "building the model, such as img_size=64.",
        ),
    ] = None,
    data: Images = None,
    picture: Annotated[
        Path | None, output("A .png, or an .html page. Default: pruning.png in the folder.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many held-out images.")] = 8,
    tile: Annotated[int, typer.Option(min=16, help="Side of an image, in pixels.")] = 112,
    keep_ratio: KeepRatio = "",
    threshold: Threshold = None,
    recipe: RecipeName = "",
    adapter: AdapterName = "",
    host: HostName = "",
    option: Options = None,
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
) -> None:
    """Draw images at each stage: dropped patches are dimmed, merged ones painted by group."""
    from tokenprune.cli.runs import held_out_images, prune_by

    given = [text for text in image or () if not SETTING.match(text) or Path(text).exists()]
    options = [*(text for text in image or () if text not in given), *(option or ())]
    is_folder = Path(model).is_dir()
    target = picture or (Path(model) if is_folder else Path()) / "pruning.png"
    check_ending(target)
    if given and data is not None:
        raise HostError("Give image files or --data, not both.")
    if not given and not is_folder and not Path(model).exists():
        raise _no_images(model)
    opened = open_model(
        model,
        options,
        recipe=recipe,
        adapter=adapter,
        host=host,
        pretrained=pretrained,
        host_weights=host_weights,
    )
    wrapped = opened.model
    prune_by(wrapped, keep_ratio, threshold)
    if given:
        with working("drawing"):
            shown, trace = picture_of(opened, [Path(file) for file in given], tile)
    else:
        if opened.folder is None:
            raise _no_images(model)
        with working("drawing"):
            bundle, _ = held_out_images(opened.folder, wrapped, data)
            shown, trace = drawn(wrapped, bundle, count, tile)
    say(f"picture   {write_picture(target, shown, trace, wrapped)}")


def _no_images(model: str) -> HostError:
    return HostError(
        f"Asked to draw {model!r}, which is no folder of a training run, without images. Name "
        f"image files: tokenprune visualize {model} cat.png dog.png -o out.png"
    )


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
