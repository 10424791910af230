"""The call of a module that a trace goes through; or that is one node, since its code decides by
what tensors hold."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, fx, nn

from tokenprune.private import DataDependentOutputException, DynamicOutputShapeException
from tokenprune.tracing.handed import ContentsReadError
from tokenprune.tracing.hooks import between_hooks
from tokenprune.tracing.interpret import run_again
from tokenprune.tracing.made import Made
from tokenprune.tracing.opaque import DATA_DEPENDENT, OPAQUE, AsTraced, Opaque, reason_of
from tokenprune.tracing.proxy import ArrayReadError
from tokenprune.tracing.randomness import Generators, torch_generators_kept

__all__ = ["NEEDS_VALUES", "Call", "inside"]

NEEDS_VALUES = (
    *(DataDependentOutputException, DynamicOutputShapeException),
    *(ArrayReadError, ContentsReadError),
)


class Call(Protocol):
    """A tracer."""

    root: nn.Module
    graph: fx.Graph

    @property
    def example(self) -> Mapping[str, Any]: ...

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, value: Any = None
    ) -> Any: ...


def inside(
    tracer: Any, m: nn.Module, path: str | None, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Trace through a module; `path` is None if forward has made it, or a list holds it."""
    if m is tracer.root:
        return forward(*args, **kwargs)
    before = tracer.so_far()
    try:
        tracer.opened[m] = None
        return between_hooks(tracer, m, path or type(m).__name__, forward, args, kwargs)
    except NEEDS_VALUES as error:
        where = tracer.failed_at(error, path)
        tracer.forget_since(before)
        tracer.opened.pop(m)
        node = (m, "call_module", path, args, kwargs)
        if path is None:
            if any(child in tracer.submodule_paths for child in m.modules()):
                raise
            made = Made(m)
            node = (made.run, "call_function", made, (tuple(made.proxies), args, kwargs), {})
            made.proxies = []
        example = tracer.example
        first = next(value for value in example.values() if isinstance(value, Tensor))
        batch_size, given = first.shape[0] if first.ndim else 1, (tracer.root, tracer.graph)
        with tracer.unrecorded(), torch_generators_kept(), Generators(tracer.root).kept():
            value = run_again(*given, example, node[0], *node[3:])
        if not _of_images(value, batch_size):
            raise
        output = tracer.create_proxy(*node[1:], value)
        reason = reason_of(error) or DATA_DEPENDENT
        output.node.meta[OPAQUE] = Opaque(where, reason, batch_size)
        images = next(
            n for n in tracer.graph.nodes if isinstance(n.meta["val"], Tensor)
        )
        checked = tracer.create_proxy(
            "call_function", AsTraced(value, batch_size), (output, tracer.proxy(images)), {}
        )
        return _opened(tracer, checked, value)


def _of_images(value: Any, batch_size: int) -> bool:
    """Whether what a module returned is of the same form in each call, as far as can be told:
    tensors with a row for each image, or numbers; other shapes may follow what the inputs hold."""
    if isinstance(value, Tensor):
        return not value.ndim or value.shape[0] == batch_size
    if type(value) in (tuple, list, dict):
        held = value.values() if isinstance(value, dict) else value
        return all(_of_images(inner, batch_size) for inner in held)
    return value is None


def _opened(tracer: Any, proxy: Any, value: Any) -> Any:
    """Containers with a proxy for each tensor in them."""
    if isinstance(value, Tensor):
        return proxy
    if value is None:
        return None
    keys = list(value) if isinstance(value, dict) else range(len(value))
    items = [tracer.create_proxy("call_function", operator.getitem, (proxy, k), {}) for k in keys]
    found = [_opened(tracer, item, value[k]) for item, k in zip(items, keys, strict=True)]
    return dict(zip(keys, found, strict=True)) if isinstance(value, dict) else type(value)(found)
