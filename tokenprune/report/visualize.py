"""A picture of the kept patches: a row for each image, a column for each stage."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import HostError, MissingDependencyError
from tokenprune.rewrite.kept.pruning_trace import PruningTrace

__all__ = ["grid_shape", "kept_pixels", "pruning_grid"]

# A dropped patch keeps this share of its colour. The rest is a blue grey that differs from both
# bright and dark images.
LEFT, DROPPED = 0.22, (0.36, 0.43, 0.54)
GAP, HEADER, LINE = 6, 34, 14
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)


def grid_shape(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the square patches of an image; a narrower margin may be left."""
    grids = [(n, num_patches // n) for n in range(1, num_patches + 1) if num_patches % n == 0]
    fitting = [
        (rows, columns)
        for rows, columns in grids
        if max(height / (rows + 1), width / (columns + 1)) < min(height / rows, width / columns)
    ]
    if not fitting:
        raise HostError(
            f"{num_patches} patch tokens form no grid over an image of {height} x {width} pixels, "
            "so they cannot be drawn. Give the images that the trace was made with; patches must "
            "be square."
        )
    return min(fitting, key=lambda grid: abs(grid[0] * width - grid[1] * height))


def kept_pixels(decision: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which pixels belong to kept patches: [B, height, width] of `size`, from [B, N] 0/1."""
    cells = decision.detach().float().reshape(-1, 1, *grid)
    return F.interpolate(cells, size, mode="nearest")[:, 0] > 0.5


def pruning_grid(
    images: Tensor, trace: PruningTrace, *, labels: Sequence[str] = (), tile: int = 112
) -> Any:
    """Draw which patches each stage kept; dropped ones are dimmed.

    Args:
        images: [B, C, height, width] pixels in [0, 1], of one or three channels.
        trace: Of the call with these images, on the mask or gather path.
        labels: A line under each image, such as its class.
        tile: Side of an image in the picture, in pixels.

    Returns:
        A `PIL.Image.Image`; its `save("x.png")` writes the file.

    Raises:
        HostError: Images and trace do not fit together.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingDependencyError(
            "Pictures need Pillow, which is not installed. Run: pip install 'tokenprune-torch[cli]'"
        ) from error
    _check(images, trace, labels)
    columns = _columns(images.detach().float().cpu().clamp(0, 1), trace, tile)
    height, width = columns[0][1].shape[-2:]
    step_x, step_y = width + GAP, height + GAP + (LINE if labels else 0)
    whole = (GAP + step_x * len(columns), HEADER + GAP + step_y * len(images))
    picture = Image.new("RGB", whole, BACKGROUND)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for number, (title, tiles) in enumerate(columns):
        left = GAP + number * step_x
        pen.multiline_text((left, 4), title, INK, font=font, spacing=2)
        for row, pixels in enumerate(tiles):
            top = HEADER + GAP + row * step_y
            data = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            picture.paste(Image.fromarray(data), (left, top))
            if labels and number == 0:
                pen.text((left, top + height + 1), labels[row], INK, font=font)
    return picture


def _columns(pixels: Tensor, trace: PruningTrace, tile: int) -> list[tuple[str, Tensor]]:
    """Title and pixels [B, 3, height, width] of each column."""
    high, wide = pixels.shape[-2:]
    scale = tile / max(high, wide)
    size = max(1, round(high * scale)), max(1, round(wide * scale))
    mode = "nearest" if scale > 1 else "area"
    large = F.interpolate(pixels.expand(-1, 3, -1, -1), size, mode=mode)
    dimmed = LEFT * large + (1 - LEFT) * torch.tensor(DROPPED).view(3, 1, 1)
    columns = [("input", large)]
    for number, stage in enumerate(trace.stages):
        decision = stage.decision.detach().cpu()
        grid = grid_shape(decision.shape[1], high, wide)
        kept = kept_pixels(decision, grid, size).unsqueeze(1)
        count = float(decision.float().sum(dim=1).mean())
        title = f"stage {number}\n{count:.4g} of {decision.shape[1]}"
        columns.append((title, torch.where(kept, large, dimmed)))
    return columns


def _check(images: Tensor, trace: PruningTrace, labels: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise HostError(
            f"Images must have the shape [B, 1 or 3, height, width], found {list(images.shape)}."
        )
    if not trace.stages:
        raise HostError(
            "This trace has no stage: it comes from the dense path. Draw one of the mask or gather "
            "path."
        )
    traced = trace.stages[0].decision.shape[0]
    if traced != len(images) or len(labels) not in (0, len(images)):
        raise HostError(
            f"Got {len(images)} images, a trace of {traced} and {len(labels)} labels. Give the "
            "images that the trace was made with, and a label for each or none."
        )
