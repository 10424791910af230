"""`tokenprune visualize`: which patches a trained model keeps."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tokenprune.cli.console import say, working
from tokenprune.report.visualize import pruning_grid

__all__ = ["draw", "visualize"]


def visualize(
    checkpoint: Annotated[Path, typer.Argument(help="What `tokenprune train` wrote.")],
    data: Annotated[
        str | None, typer.Option(help="Folder of images. Default: those of the training run.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The PNG. Default: pruning.png in the checkpoint.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    tile: Annotated[int, typer.Option(min=16, help="Side of an image, in pixels.")] = 112,
    keep_ratio: Annotated[
        str, typer.Option(help="Prune by another ratio: 0.7, or one for each stage: 0.7,0.5.")
    ] = "",
    threshold: Annotated[
        float | None, typer.Option(help="Keep the tokens whose keep probability is above this.")
    ] = None,
) -> None:
    """Draw held-out images at each stage, with dropped patches dimmed."""
    from tokenprune.cli.runs import prune_by, reopen

    with working("loading"):
        run = reopen(checkpoint, data)
        prune_by(run.model, keep_ratio, threshold)
    with working("drawing"):
        picture = draw(run.model, run.data, count, tile)
    target = output or checkpoint / "pruning.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target, format="PNG")
    say(f"picture   {target}")


def draw(model: nn.Module, data: Any, count: int, tile: int = 112) -> Any:
    """A picture of evenly spaced held-out images, and of the patches that the model keeps.

    Args:
        model: What `wrap` returned; runs in eval mode, its mode is restored.
        data: A `DataBundle`.
        count: How many images.
        tile: Side of an image, in pixels.
    """
    from tokenprune.tracing.state import kept_modes
    from tokenprune.train.logits import class_logits

    total = len(data.eval)
    count = min(count, total)
    chosen = [total * number // count for number in range(count)]
    items = [data.eval[index] for index in chosen]
    images = torch.stack([item["pixel_values"] for item in items])
    device = next(model.parameters()).device
    with kept_modes(model), torch.no_grad():
        output, trace = model.eval()(images.to(device), return_trace=True)
    guesses = class_logits(output, data.num_classes).argmax(1).tolist()
    names = data.class_names
    labels = [
        f"{names[item['labels']]}, predicted {names[guess]}"
        for item, guess in zip(items, guesses, strict=True)
    ]
    return pruning_grid(data.to_pixels(images), trace, labels=labels, tile=tile)
