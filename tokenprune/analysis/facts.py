"""What the probe of token axes finds (`axes.py`), and what the passes read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

__all__ = ["Aligned", "TokenAxes", "TokenDim"]


class TokenDim(NamedTuple):
    """One dim that counts tokens: `prefix` rows first, then the patches kept by `stage`."""

    stage: int
    prefix: int


class Aligned(NamedTuple):
    """An argument that was made for all tokens: `dims` maps its token dims to what they count.

    `rank` is that of the tensor it is combined with; the gathered tensor is a batch of that rank.
    `fold` is how many rows of that tensor's dim 0 are one image.
    """

    dims: Mapping[int, TokenDim]
    rank: int
    fold: int = 1


@dataclass
class TokenAxes:
    """What the probe found. Nodes are those of the probed graph."""

    dims: dict[fx.Node, dict[int, TokenDim]] = field(default_factory=dict)
    """Token dims of each tensor that holds tokens."""
    folded: set[fx.Node] = field(default_factory=set)
    """Tensors with a dim that counts tokens times something else (batch, heads)."""
    batch_first: set[fx.Node] = field(default_factory=set)
    """Tensors whose dim 0, and no other, counts images."""
    batch_fold: dict[fx.Node, int] = field(default_factory=dict)
    """Tensors whose dim 0, and no other, counts images times something else (heads): how many."""
    batched: set[fx.Node] = field(default_factory=set)
    """Tensors some dim of which counts images, alone or times something else."""
    aligned: dict[fx.Node, dict[fx.Node, Aligned]] = field(default_factory=dict)
    """Consumer -> argument -> how that argument must be gathered."""
    sizes: set[fx.Node] = field(default_factory=set)
    """Numbers that change with the number of tokens."""
    table_sizes: dict[fx.Node, dict[int, TokenDim]] = field(default_factory=dict)
    """Shapes of aligned tables that are read as numbers: those dims follow the tokens."""
    tables: set[fx.Node] = field(default_factory=set)
    """Tensors that take only their size from the tokens: made at full length, then gathered."""
    counts: set[fx.Node] = field(default_factory=set)
    """Sums over a padding mask: how many real tokens there are."""
    real: fx.Node | None = None
    """Which tokens are no padding: [B, L] or [B, N]."""
    batch_bound: bool = False
    """A decision or a burnt-in size depends on the batch size."""
