"""How the tokens of one image lie where they enter a block."""

from dataclasses import dataclass

from torch import nn

from tokenprune.analysis.blocks import Block
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.layout import Layout

__all__ = ["Grid", "grid_of"]


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


def grid_of(root: nn.Module, batch_size: int, block: Block, num_prefix: int) -> Grid:
    """The tokens that enter a block; UnsupportedHostError if nothing tells how they lie."""
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
    ran = {str(n.target) for n in block.call.nodes() if n.op == "call_module"}
    own = root.get_submodule(block.path).modules() if block.path else map(root.get_submodule, ran)
    widths = [*map(_width_taken, own)]
    first, last = (True, shape[1]) in widths, (False, shape[-1]) in widths
    if first != last:
        return first
    square_first, square_last = shape[2] == shape[3], shape[1] == shape[2]
    if square_first != square_last:
        return bool(square_first)
    for node in block.call.nodes():  # all dims are equal: what the block runs first tells
        width = _width_taken(root.get_submodule(node.meta["where"].module))
        if width is not None and width[1] == shape[1]:
            return width[0]
    raise UnsupportedHostError(
        f"Cannot tell which dim of {tuple(shape)} holds the channels of the tokens that enter a "
        f"{type(root.get_submodule(block.path)).__name__}. Use another image size, so that the "
        "dims differ."
    )


def _width_taken(module: nn.Module) -> tuple[bool, int] | None:
    """Whether a module finds channels in dim 1 or else in the last, and how many."""
    if isinstance(module, nn.Conv2d):
        return True, module.in_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True, module.num_features
    if isinstance(module, nn.Linear):
        return False, module.in_features
    if isinstance(module, nn.LayerNorm):
        return type(module).__name__.endswith("2d"), int(module.normalized_shape[-1])
    return None
