"""Look-ups in a traced graph, whose nodes carry their value in `meta["val"]`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from tokenprune.private import tree_leaves

__all__ = ["IDENTITY", "holds_no_tensor", "makers", "shape_of"]

IDENTITY = "identity"
"""Key in the `meta` of a node that analysis put into a traced graph: whether it is its input."""


def makers(node: fx.Node, enter: Callable[[fx.Node], object]) -> Iterator[fx.Node]:
    """`node` and what it was made of, the nearest first, as far back as `enter` allows."""
    queue, seen = [node], {node}
    for each in queue:
        yield each
        fresh = [used for used in each.all_input_nodes if used not in seen and enter(used)]
        seen.update(fresh)
        queue += fresh


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor; () if it holds none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def holds_no_tensor(value: Any) -> bool:
    """Whether a node's value is plain Python: numbers, shapes, None."""
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
