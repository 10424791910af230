"""A picture of what became of the patches: a row for each image, a column for each stage.

Where patches were merged, an image has a second row, in which each group has its mean colour.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.errors import HostError, MissingDependencyError
from tokenprune.rewrite.kept.pruning_trace import PruningTrace

__all__ = ["grid_shape", "kept_pixels", "paint_groups", "pruning_grid"]

# A dropped patch keeps this share of its colour. The rest is a blue grey that differs from both
# bright and dark images.
LEFT, DROPPED = 0.22, (0.36, 0.43, 0.54)
GAP, HEADER, LINE = 6, 34, 14
BACKGROUND, INK = (255, 255, 255), (30, 30, 30)
# A border is the colour of its group, moved by this share towards black, or white if it is dark.
BORDER = 0.55
LEGEND = ("above: patches that\nstand for a group", "below: each group\nin its mean colour")


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
    return _spread(decision.detach(), grid, size) > 0.5


def paint_groups(images: Tensor, groups: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Paint each group of patches in the mean colour of its pixels, with borders between groups.

    A pixel is a border if the one to its right or below it belongs to another group. Groups of
    several pieces have one colour; no border is inside a piece.

    Args:
        images: [B, C, height, width] pixels in [0, 1], of one or three channels.
        groups: [B, N] for each patch, row by row, a number from 0 to N - 1 that the patches of its
            group share: `trace.stages[s].groups`.
        size: Height and width of the result; those of `images` if None.

    Returns:
        [B, 3, *size] pixels in [0, 1].

    Raises:
        HostError: The patches form no grid over the images.
    """
    pixels, number = images.detach().float().cpu(), groups.detach().cpu()
    high, wide = pixels.shape[-2:]
    grid = grid_shape(number.shape[1], high, wide)
    flat = pixels.expand(-1, 3, -1, -1).flatten(2)
    at = _spread(number, grid, (high, wide)).flatten(1).unsqueeze(1)  # the group of each pixel
    count = torch.zeros(len(flat), 1, number.shape[1]).scatter_add(2, at, torch.ones(at.shape))
    total = torch.zeros(len(flat), 3, number.shape[1])
    mean = total.scatter_add(2, at.expand_as(flat), flat) / count.clamp_min(1)
    shown = _spread(number, grid, size or (high, wide))
    painted = mean.gather(2, shown.flatten(1).unsqueeze(1).expand(-1, 3, -1))
    painted = painted.reshape(len(flat), 3, *shown.shape[1:])
    edge = torch.zeros_like(shown, dtype=torch.bool)
    edge[:, :, :-1] |= shown[:, :, 1:] != shown[:, :, :-1]
    edge[:, :-1] |= shown[:, 1:] != shown[:, :-1]
    towards = (painted.mean(1, keepdim=True) < 0.5).float()
    return torch.where(edge.unsqueeze(1), painted + BORDER * (towards - painted), painted)


def _spread(numbers: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """What each pixel's patch holds: [B, *size] of [B, N]."""
    rows, columns = (
        torch.div(torch.arange(length) * cells, length, rounding_mode="floor")
        for length, cells in zip(size, grid, strict=True)
    )
    return numbers.reshape(-1, *grid)[:, rows][:, :, columns]


def pruning_grid(
    images: Tensor, trace: PruningTrace, *, labels: Sequence[str] = (), tile: int = 112
) -> Any:
    """Draw which patches each stage kept; dropped ones are dimmed.

    Where a stage merged patches, a second row of the image shows its groups (`paint_groups`), and
    those that are not dimmed in the first one are the patches that stand for the groups.

    Args:
        images: [B, C, height, width] pixels in [0, 1], of one or three channels.
        trace: Of the call with these images, on the mask or gather path. Stages may see grids of
            different sizes.
        labels: A line under each image, such as its class.
        tile: The longer side of an image in the picture, in pixels.

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
    height, width = columns[0][1][0].shape[-2:]
    rows = max(len(shown) for _, shown in columns)  # of one image
    step_x, step_y = width + GAP, rows * (height + GAP) + (LINE if labels else 0)
    whole = (GAP + step_x * len(columns), HEADER + GAP + step_y * len(images))
    picture = Image.new("RGB", whole, BACKGROUND)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for number, (title, shown) in enumerate(columns):
        left = GAP + number * step_x
        short = title.removesuffix(" tokens")
        fits = pen.multiline_textbbox((0, 0), title, font=font)[2] <= step_x
        pen.multiline_text((left, 4), title if fits else short, INK, font=font, spacing=2)
        for image in range(len(images)):
            top = HEADER + GAP + image * step_y
            for line, tiles in enumerate(shown):
                data = (tiles[image].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
                picture.paste(Image.fromarray(data), (left, top + line * (height + GAP)))
            if labels and number == 0:
                under = top + rows * (height + GAP) - GAP + 1
                pen.text((left, under), labels[image], INK, font=font)
            if rows > 1 and number == 0:
                _write_legend(pen, font, (left, top + height + GAP), (width, height))
    return picture


def _write_legend(pen: Any, font: Any, at: tuple[int, int], room: tuple[int, int]) -> None:
    """Say what the two rows of an image are, as far as there is room."""
    left, below = at
    for text in LEGEND:
        box = pen.multiline_textbbox((left, below), text, font=font)
        if box[2] > left + room[0] or box[3] > at[1] + room[1]:
            return
        pen.multiline_text((left, below), text, INK, font=font)
        below = int(box[3]) + GAP


def _columns(pixels: Tensor, trace: PruningTrace, tile: int) -> list[tuple[str, list[Tensor]]]:
    """Title of each column and its pixels, [B, 3, height, width] for each row of an image."""
    high, wide = pixels.shape[-2:]
    scale = tile / max(high, wide)
    size = max(1, round(high * scale)), max(1, round(wide * scale))
    mode = "nearest" if scale > 1 else "area"
    large = F.interpolate(pixels.expand(-1, 3, -1, -1), size, mode=mode)
    dimmed = LEFT * large + (1 - LEFT) * torch.tensor(DROPPED).view(3, 1, 1)
    columns = [("input", [large])]
    for number, stage in enumerate(trace.stages):
        decision = stage.decision.detach().cpu()
        grid = grid_shape(decision.shape[1], high, wide)
        kept = kept_pixels(decision, grid, size).unsqueeze(1)
        count = float(decision.float().sum(dim=1).mean())
        title = f"stage {number}\n{count:.4g} of {decision.shape[1]} tokens"
        shown = [torch.where(kept, large, dimmed)]
        if stage.groups is not None:
            shown.append(paint_groups(pixels, stage.groups, size))
        columns.append((title, shown))
    return columns


def _check(images: Tensor, trace: PruningTrace, labels: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise HostError(
            f"Images must have the shape [B, 1 or 3, height, width], found {list(images.shape)}. "
            "Pass the images of the traced call."
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
