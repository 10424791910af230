"""Run a graph node by node, on fake or real tensors, with every value open to inspection."""

import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from tokenprune.private import FakeTensor, active_fake_mode, tree_leaves, tree_map
from tokenprune.tracing.effects import Store
from tokenprune.tracing.handed import HANDED, HandedProxy
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.hooks import UNHOOKED, calls_unhooked, unhooked
from tokenprune.tracing.modes import MODES, entered
from tokenprune.tracing.opaque import OPAQUE
from tokenprune.tracing.proxy import ValueProxy

__all__ = [
    "evaluate",
    "quiet_trials",
    "returned_nodes",
    "run",
    "run_again",
    "tensor_attribute",
    "tensors_in",
]

Environment = dict[fx.Node, Any]


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


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in containers, plain dataclasses included, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def evaluate(
    root: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any], shapes_alone: bool = False
) -> Any:
    """The value of one node (not a placeholder, not the output), its arguments taken from `env`,
    in the modes that the host sets there. No hook runs under fake tensors, nor on meta tensors
    (`shapes_alone`)."""
    if node.op == "get_attr":
        mode, known = active_fake_mode(), node.meta.get("val")
        faked = isinstance(known, FakeTensor) and known.fake_mode is mode
        return known if faked else tensor_attribute(root, str(node.target))
    if MODES in node.meta:
        with entered(node.meta[MODES]):
            return _called(root, node, env, shapes_alone)
    return _called(root, node, env, shapes_alone)


def _called(root: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any], shapes_alone: bool) -> Any:
    args = map_arg(node.args, env.__getitem__)
    kwargs = map_arg(node.kwargs, env.__getitem__)
    fake = shapes_alone or active_fake_mode() is not None
    if isinstance(node.target, Store) or (fake and is_hook_node(node)):
        return None  # that is for a real call
    if fake and OPAQUE in node.meta:
        return _as_returned(node, env)
    if node.op == "call_function":
        ours = fake and any(isinstance(given, nn.Module) for given in args)
        with calls_unhooked() if ours else nullcontext():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = root.get_submodule(str(node.target))
    if fake:
        return unhooked(module, args, kwargs)
    return (module.forward if UNHOOKED in node.meta else module)(*args, **kwargs)


def _as_returned(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """What an opaque module returned in the trace, for as many images as there are now."""
    batch = node.meta[OPAQUE].batch_size
    given = [(n.meta["val"], env[n]) for n in node.all_input_nodes]
    tensors = [(was, now) for was, now in given if isinstance(now, Tensor)]
    images = next((len(now) for was, now in tensors if was.shape[:1] == (batch,)), batch)
    learns = torch.is_grad_enabled() and any(now.requires_grad for _, now in tensors)

    def alike(traced: Any) -> Any:
        if not isinstance(traced, Tensor):
            return traced
        rows = (images,) if traced.shape[:1] == (batch,) else traced.shape[:1]
        made = traced.new_empty((*rows, *traced.shape[1:]))
        return made.requires_grad_(learns and made.is_floating_point())

    return tree_map(alike, node.meta["val"])


def run(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Mapping[str, Any],
    step: Callable[[fx.Node, Environment], Any] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Yield each node with its value; values are let go after their last use.

    Args:
        step: Computes a node's value; `evaluate` if None.
    """
    last_use = {used: node for node in graph.nodes for used in node.all_input_nodes}
    env: Environment = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known = HANDED not in node.meta or node.target in inputs
            env[node] = inputs[node.target] if known else None
        elif node.op == "output":
            yield node, map_arg(node.args[0], env.__getitem__)
            return
        else:
            env[node] = step(node, env) if step else evaluate(root, node, env)
        yield node, env[node]
        for used in (*node.all_input_nodes, node):
            if last_use.get(used, node) is node:
                env.pop(used, None)


def run_again(
    root: nn.Module,
    graph: fx.Graph,
    inputs: Mapping[str, Any],
    module: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """What a module returns on real tensors, its arguments given as proxies of a graph that is not
    finished; no hook of another module runs."""

    def step(node: fx.Node, env: Environment) -> Any:
        return None if is_hook_node(node) else evaluate(root, node, env)

    known = dict(run(root, graph, inputs, step))

    def real(argument: Any) -> Any:
        proxied = type(argument) in (ValueProxy, HandedProxy)
        return known[argument.node] if proxied else argument

    return module(*map_aggregate(args, real), **map_aggregate(kwargs, real))


def returned_nodes(output: Any) -> list[fx.Node]:
    """The nodes whose values an output holds: those that went into its objects, in order."""
    found: list[fx.Node] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, fx.Node) and isinstance(leaf.target, type):
            found += returned_nodes((leaf.args, dict(leaf.kwargs)))
        elif isinstance(leaf, fx.Node):
            found.append(leaf)
    return found
