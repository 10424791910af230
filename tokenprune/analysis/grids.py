"""How the tokens of one image lie where they enter a block."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tokenprune.analysis.blocks import Block
from tokenprune.errors import PlanError, UnsupportedHostError
from tokenprune.ops.layout import Layout

__all__ = ["Grid", "grid_of", "site_grids"]


@dataclass(frozen=True)
class Grid:
    """The tokens of one image where they enter a block.

    Attributes:
        length: L, prefix tokens included.
        num_patches: N.
        num_channels: D.
        layout: How the tensor holds them.
    """

    length: int
    num_patches: int
    num_channels: int
    layout: Layout


def site_grids(
    root: nn.Module,
    batch_size: int,
    blocks: Sequence[Block],
    num_prefix: int,
) -> tuple[Grid, ...]:
    """The tokens that each stage sees.

    Args:
        batch_size: B of the trace.
        blocks: The block of each stage.
        num_prefix: P.

    Raises:
        PlanError: A stage sees fewer than two patch tokens.
        UnsupportedHostError: It cannot be told which dim holds the channels.
    """
    grids = []
    for block in blocks:
        grid = grid_of(root, batch_size, block, num_prefix)
        if grid.num_patches < 2:
            raise PlanError(
                f"There are {grid.num_patches} patch tokens after {num_prefix} prefix tokens at "
                f"block {block.number} ({block.entry.meta['where']}); nothing can be pruned. Check "
                "num_prefix_tokens."
            )
        grids.append(grid)
    return tuple(grids)


def grid_of(root: nn.Module, batch_size: int, block: Block, num_prefix: int) -> Grid:
    """The tokens that enter a block."""
    shape = block.entry.meta["val"].shape
    if len(shape) < 3:
        raise UnsupportedHostError(
            f"Block {block.number} takes a tensor of shape {tuple(shape)}; tokens need at least "
            f"the dims [B, L, D]. Found at {block.entry.meta['where']}."
        )
    first = len(shape) == 4 and _channels_first(root, block)
    layout = Layout(max(shape[0] // batch_size, 1), first)
    channels = shape[1] if first else shape[-1]
    length = shape.numel() // channels // (shape[0] // layout.rows_per_image)
    return Grid(length, length - num_prefix, channels, layout)


def _channels_first(root: nn.Module, block: Block) -> bool:
    """Whether a block's [B, ?, ?, ?] is [B, D, H, W]: told by the widths that its modules take."""
    shape = block.entry.meta["val"].shape
    modules = list(root.get_submodule(block.path).modules())
    first = any(_takes_first(module) == shape[1] for module in modules)
    last = any(_takes_last(module) == shape[-1] for module in modules)
    if first != last:
        return first
    square_first, square_last = shape[2] == shape[3], shape[1] == shape[2]
    if square_first != square_last:
        return bool(square_first)
    for node in block.call.nodes():  # all dims are equal: what the block runs first tells
        module = root.get_submodule(node.meta["where"].module)
        if shape[1] in (_takes_first(module), _takes_last(module)):
            return _takes_first(module) is not None
    raise UnsupportedHostError(
        f"Cannot tell which dim of {tuple(shape)} holds the channels of the tokens that enter a "
        f"{type(root.get_submodule(block.path)).__name__}. Use another image size, so that the "
        "dims differ."
    )


def _takes_first(module: nn.Module) -> int | None:
    """Channels that a module finds in dim 1."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    if isinstance(module, nn.LayerNorm) and type(module).__name__.endswith("2d"):
        return int(module.normalized_shape[-1])
    return None


def _takes_last(module: nn.Module) -> int | None:
    """Channels that a module finds in the last dim."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.LayerNorm) and not type(module).__name__.endswith("2d"):
        return int(module.normalized_shape[-1])
    return None
