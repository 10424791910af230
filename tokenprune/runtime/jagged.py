"""Calls in which images keep different numbers of tokens."""

from collections.abc import Callable
from typing import Any
from weakref import ref

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
        self._seen: tuple[ref[nn.Module], list[nn.Module]] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, settings: Any, **tensors: Tensor) -> Any:
        run = self.padded if any(map(has_hooks, self._modules(model))) else self.packed
        return run(model, settings, **tensors)

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        """The leaves of a model; guards see that another one takes the place of one."""
        if self._seen is None or self._seen[0]() is not model:
            self._seen = ref(model), list(map(model.get_submodule, self.leaves))
        return self._seen[1]
