"""What stands in a graph for a value that a host passes to a call or returns."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from torch import fx, nn

__all__ = ["argument_of"]


class Recorder(Protocol):
    """A tracer."""

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any) -> fx.Node: ...

    def create_arg(self, a: Any) -> Any: ...

    def path_of_module(self, mod: nn.Module) -> str: ...


def argument_of(tracer: Recorder, a: Any, usual: Callable[[Any], Any]) -> Any:
    """The node, or the constant, for a value; `usual` is what torch.fx makes of it.

    Raises:
        NotImplementedError: A graph cannot hold it.
    """
    if isinstance(a, np.generic):  # its repr would need numpy in the graph's code
        return a.item()
    if isinstance(a, nn.Module):
        return _node(tracer, "get_attr", tracer.path_of_module(a), (), {}, a)
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        fields = [(f, getattr(a, f.name)) for f in dataclasses.fields(a) if f.init]
        said = {f.name: v for f, v in fields if v is not None or f.default is not None}
        given = {name: tracer.create_arg(value) for name, value in said.items()}
        return _node(tracer, "call_function", type(a), (), given)
    if isinstance(a, tuple) and hasattr(a, "_fields"):
        return _node(tracer, "call_function", type(a), tuple(map(tracer.create_arg, a)), {})
    if isinstance(a, dict) and type(a) is not dict:
        return _node(tracer, "call_function", type(a), (usual(dict(a)),), {})
    try:
        return usual(a)
    except NotImplementedError as error:
        if isinstance(a, tuple | list | dict | slice):
            raise  # something in it has said what is wrong
        raise NotImplementedError(
            f"a {type(a).__name__} in an output or a call; if the host keeps a cache, turn it "
            "off (config.use_cache = False)"
        ) from error


def _node(
    tracer: Recorder, kind: str, target: Any, args: Any, kwargs: Any, value: Any = None
) -> fx.Node:
    """A node whose value nothing computes with: a module, or an output object."""
    node = tracer.create_node(kind, target, args, kwargs)
    node.meta["val"] = value
    return node
