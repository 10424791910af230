"""Calls in which images keep different numbers of tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tokenprune.tracing.hooks import has_hooks

__all__ = ["Jagged"]


class Jagged:
    """A program in which tokens are packed, and the same with padded ones for a model whose modules
    have hooks: they expect a batch of images.

    `torch.compile` leaves it as it is, since its shapes depend on what the images hold.
    """

    def __init__(
        self, padded: Callable[..., Any], packed: Callable[..., Any], graph: fx.Graph
    ) -> None:
        self.padded, self.packed = padded, packed
        self.leaves = {str(node.target) for node in graph.find_nodes(op="call_module")}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, settings: Any, **tensors: Tensor) -> Any:
        hooked = any(has_hooks(model.get_submodule(path)) for path in self.leaves)
        run = self.padded if hooked else self.packed
        return run(model, settings, **tensors)
