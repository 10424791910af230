"""The call of a module that a trace goes through; or that is one node, since its code decides by
what tensors hold."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenprune.private import DataDependentOutputException, DynamicOutputShapeException
from tokenprune.tracing.handed import ContentsReadError
from tokenprune.tracing.hooks import between_hooks
from tokenprune.tracing.interpret import run_again
from tokenprune.tracing.made import Made
from tokenprune.tracing.opaque import DATA_DEPENDENT, OPAQUE, AsTraced, Opaque, reason_of
from tokenprune.tracing.proxy import ArrayReadError
from tokenprune.tracing.randomness import Generators, torch_generators_kept

__all__ = ["NEEDS_VALUES", "inside"]

NEEDS_VALUES = (
    *(DataDependentOutputException, DynamicOutputShapeException),
    *(ArrayReadError, ContentsReadError),
)


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
        opaque = tracer.failed_at(error, path), reason_of(error) or DATA_DEPENDENT
        tracer.forget_since(before)
        tracer.opened.pop(m)
        run, node = _as_one_node(tracer, m, path, args, kwargs)
        images = next(n for n in tracer.graph.nodes if isinstance(n.meta["val"], Tensor))
        with tracer.unrecorded(), torch_generators_kept(), Generators(tracer.root).kept():
            batch_size = len(images.meta["val"]) if images.meta["val"].ndim else 1
            try:
                value = run_again(tracer.root, tracer.graph, tracer.example, run, *node[2:])
            except (AssertionError, ValueError):
                raise  # the module itself refuses what it is given
            except Exception:
                raise error from None
        if not _of_images(value, batch_size):
            raise
        output = tracer.create_proxy(*node, value)
        output.node.meta[OPAQUE] = Opaque(*opaque, batch_size)
        given = (output, tracer.proxy(images))
        checked = tracer.create_proxy("call_function", AsTraced(value, batch_size), given, {})
        return _opened(tracer, checked, value)


def _as_one_node(
    tracer: Any, m: nn.Module, path: str | None, args: Any, kwargs: Any
) -> tuple[Callable[..., Any], tuple[str, Any, Any, Any]]:
    """What runs a module, and the node that does.

    Raises:
        NotImplementedError: Forward has made it, of tensors or modules that no graph can give it.
    """
    if path is not None:
        return m, ("call_module", path, args, kwargs)
    if any(child in tracer.submodule_paths for child in m.modules()):
        raise NotImplementedError(
            f"a {type(m).__name__} that forward makes around a module of the host, and whose code "
            "decides by what tensors hold"
        )
    made = Made(m)
    proxies, made.proxies = tuple(made.proxies), []
    return made.run, ("call_function", made, (proxies, args, kwargs), {})


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
