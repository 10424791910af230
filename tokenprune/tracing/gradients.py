"""Whether a traced tensor requires gradients: what autograd says of the graph so far.

A trace runs without gradients. When a host's Python code asks, the graph runs once more under fake
tensors, in the modes of the caller and with the flags that inputs and parameters have.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from tokenprune.private import FakeTensorMode
from tokenprune.tracing.handed import HANDED
from tokenprune.tracing.interpret import Environment, evaluate

__all__ = ["GradientRun"]


class GradientRun:
    """A run that goes on whenever it is asked.

    Args:
        root: Holds the modules.
        graph: May grow between two questions.
        example: The arguments of the traced call.
        grad: Whether the caller records gradients.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        fake_mode: FakeTensorMode,
        example: Mapping[str, Any],
        grad: bool,
    ) -> None:
        self.root, self.graph, self.fake_mode = root, graph, fake_mode
        self.example, self.grad = example, grad
        self._values: Environment = {}

    def value(self, node: fx.Node) -> Any:
        """What `node` holds after all that the graph does so far, with its gradients."""
        with torch.set_grad_enabled(self.grad), self.fake_mode:
            for each in self.graph.nodes:
                if each not in self._values:
                    self._values[each] = self._step(each)
        return self._values[node]

    def _step(self, node: fx.Node) -> Any:
        if node.op != "placeholder":
            return evaluate(self.root, node, self._values)
        if HANDED in node.meta:
            return None
        tensor: torch.Tensor = node.meta["val"].detach()
        return tensor.requires_grad_(self.example[str(node.target)].requires_grad)
