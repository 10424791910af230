"""Run a graph node by node, on fake or real tensors, with every value open to inspection."""

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

__all__ = ["OPAQUE", "evaluate", "quiet_trials", "run", "tensor_attribute"]

Environment = dict[fx.Node, Any]
OPAQUE = "opaque"
"""Key in the `meta` of a node that calls a module whose code decides by what tensors hold: the line
of the host's source that asks."""


@contextmanager
def quiet_trials() -> Iterator[None]:
    """Silence torch's log while nodes are run to see whether they fail under fake tensors."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was


def tensor_attribute(root: nn.Module, path: str) -> Any:
    """The parameter, buffer or module at a dotted `path` below `root`."""
    return operator.attrgetter(path)(root)


def _opaque_output(node: fx.Node, given: Any) -> torch.Tensor | None:
    """An opaque node's output for fake tensors: of the traced shape, for as many images."""
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    if OPAQUE not in node.meta or not any(isinstance(t, FakeTensor) for t in tensors):
        return None
    traced: torch.Tensor = node.meta["val"]
    return traced.new_empty(tensors[0].shape[0], *traced.shape[1:])


def evaluate(root: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """The value of one node (not a placeholder, not the output), its arguments taken from `env`."""
    if node.op == "get_attr":
        return tensor_attribute(root, str(node.target))
    args = map_arg(node.args, env.__getitem__)
    kwargs = map_arg(node.kwargs, env.__getitem__)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    opaque = _opaque_output(node, (args, kwargs))
    if opaque is not None:
        return opaque
    return root.get_submodule(str(node.target))(*args, **kwargs)


def run(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Mapping[str, Any],
    step: Callable[[fx.Node, Environment], Any] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Yield each node with its value; values are let go after their last use.

    Args:
        root: Where modules, parameters and buffers are looked up.
        inputs: Placeholder name -> value.
        step: Computes a node's value; `evaluate` if None.
    """
    last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}
    env: Environment = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = inputs[node.target]
        elif node.op == "output":
            yield node, map_arg(node.args[0], env.__getitem__)
            return
        else:
            env[node] = step(node, env) if step else evaluate(root, node, env)
        yield node, env[node]
        for used in (*node.all_input_nodes, node):
            if last_use.get(used, node) is node:
                env.pop(used, None)
