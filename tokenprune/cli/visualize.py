"""`tokenprune visualize`: which patches a trained model keeps."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from tokenprune.cli.console import say, working
from tokenprune.cli.options import Checkpoint, Images, KeepRatio, Threshold
from tokenprune.report.visualize import pruning_grid

__all__ = ["draw", "visualize"]


def visualize(
    checkpoint: Checkpoint,
    data: Images = None,
    output: Annotated[
        Path | None, typer.Option(help="The PNG. Default: pruning.png in the checkpoint.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    tile: Annotated[int, typer.Option(min=16, help="Side of an image, in pixels.")] = 112,
    keep_ratio: KeepRatio = "",
    threshold: Threshold = None,
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
    """A picture of evenly spaced held-out images, each `tile` pixels wide or high, and of the
    patches that the model keeps."""
    from tokenprune.losses.logits import class_logits
    from tokenprune.tracing.state import in_mode

    total = len(data.eval)
    count = min(count, total)
    items = [data.eval[total * number // count] for number in range(count)]
    images = torch.stack([item["pixel_values"] for item in items])
    device = next(model.parameters()).device
    with in_mode(model, training=False), torch.no_grad():
        output, trace = model(images.to(device), return_trace=True)
    guesses = class_logits(output, data.num_classes).argmax(1).tolist()
    names, pairs = data.class_names, zip(items, guesses, strict=True)
    labels = [f"{names[item['labels']]}, predicted {names[guess]}" for item, guess in pairs]
    return pruning_grid(data.to_pixels(images), trace, labels=labels, tile=tile)
