"""Trace a host's forward into a torch.fx graph, without running it for real.

`torch.fx.symbolic_trace` stops at the first `if`. Here proxies carry the value they had on an
example input (`proxy.ValueProxy`), computed under fake tensors: no memory and no arithmetic. Every
tensor operation outside a leaf is caught by a torch function mode, so tensors that a host makes
from plain numbers (`torch.arange(n)`) become nodes as well, not constants.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from tokenprune.tracing.decompose import DECOMPOSED
from tokenprune.tracing.functions import functions_recorded
from tokenprune.tracing.interpret import tensor_attribute
from tokenprune.tracing.opaque import OPAQUE, as_traced, run_on_example
from tokenprune.tracing.provenance import failed_at, where_called
from tokenprune.tracing.proxy import ValueProxy, concrete
from tokenprune.tracing.state import attributes_kept, caches_emptied

__all__ = ["NUMBER", "RecordedCall", "ValueTracer"]

MODULE_CALL = nn.Module.__call__
# Tracing patches torch for the whole process; calls of other threads pass through the patches.
ONE_AT_A_TIME = threading.RLock()
MODULE_GETATTR = nn.Module.__getattr__
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
NUMBER = "number"
"""Key in a node's `meta`: nodes are numbered in the order in which the host made them."""


class RecordedCall(NamedTuple):
    """One call of a module.

    Attributes:
        path: Of the module.
        inputs: Its tensor arguments, in order.
        output: The first tensor that it returned; None if there is none.
        start: Number of the first node that it made.
        stop: One more than the number of the last.
    """

    path: str
    inputs: tuple[fx.Node, ...]
    output: fx.Node | None
    start: int
    stop: int


def _named_tensors(root: nn.Module) -> Iterator[tuple[int, str]]:
    """id -> path of every tensor that some module holds, plain attributes included."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        held = {**vars(module), **module._buffers, **module._parameters}
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                yield id(value), prefix + name


def _given(built: Any) -> Iterator[tuple[str, Any]]:
    """What an instance of a dataclass was made of; what is None by default is left out."""
    for field in dataclasses.fields(built):
        value = getattr(built, field.name)
        if field.init and not (value is None and field.default is None):
            yield field.name, value


def _holds_tensor(values: Any) -> bool:
    """Whether there is anything to record: a host may call an `nn.Identity` with None."""
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(values))


class ValueTracer(fx.Tracer):
    """Records one call of a host.

    Args:
        root: The host; nothing of it is changed, and patches last only as long as the trace.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._executing = False
        self._thread = threading.get_ident()
        self.specialized: list[fx.Node] = []
        self.calls: list[RecordedCall] = []
        self.tensor_attrs = {}
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self._names = dict(_named_tensors(root))
        self._attributes: dict[str, ValueProxy] = {}
        self._modules_entered: list[str] = []
        self._failed_in = ""
        self._example: Mapping[str, Any] = {}
        self._count = 0

    def record(self, forward: Callable[..., Any], example: Mapping[str, Any]) -> fx.Graph:
        """Trace `forward(**example)`.

        Args:
            forward: The host's forward, bound.
            example: Name -> tensor (becomes an input) or any other value (specialized on).
        """
        self._example = example
        arguments = {}
        for name, value in example.items():
            if isinstance(value, torch.Tensor):
                value = self.create_proxy("placeholder", name, (), {}, value=value)
            arguments[name] = value
        with ONE_AT_A_TIME, self._patched(), attributes_kept(self.root), caches_emptied(self.root):
            output = forward(**arguments)
            self.create_node("output", "output", (self.create_arg(output),), {})
        return self.graph

    @contextmanager
    def _patched(self) -> Iterator[None]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.executing:
                return MODULE_CALL(module, *args, **kwargs)
            forward = DECOMPOSED.get(type(module))

            def inside(*a: Any, **k: Any) -> Any:
                return forward(module, *a, **k) if forward else MODULE_CALL(module, *a, **k)

            return self.call_module(module, inside, args, kwargs)

        def getattribute(module: nn.Module, name: str) -> Any:
            value = MODULE_GETATTR(module, name)
            if isinstance(value, torch.Tensor) and not self.executing:
                return self._attribute(value)
            return value

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(nn.Module, "__call__", call))
            stack.enter_context(mock.patch.object(nn.Module, "__getattr__", getattribute))
            stack.enter_context(torch.no_grad())
            stack.enter_context(functions_recorded(self))
            yield

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread, which has nothing to do with the trace."""
        return threading.get_ident() != self._thread

    @property
    def executing(self) -> bool:
        """Whether calls run as they are instead of being recorded."""
        return self._executing or self.elsewhere

    def _attribute(self, tensor: torch.Tensor) -> Any:
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def specialize(self, node: fx.Node, convert: Callable[[Any], Any]) -> Any:
        """`convert` (bool, int, float, ...) applied to `node`'s value, which Python reads."""
        if self.executing:
            return convert(node.meta["val"])
        self.specialized.append(node)
        self._executing = True
        try:
            return convert(node.meta["val"])
        finally:
            self._executing = False

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        value: Any = None,
        **options: Any,
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind != "output":
            proxy.node.meta["val"] = self._evaluate(kind, target, args, kwargs, value)
        return proxy

    def _evaluate(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> Any:
        was, self._executing = self._executing, True
        try:
            if kind == "placeholder":
                return self.fake_mode.from_tensor(value)
            if kind == "get_attr":
                value = tensor_attribute(self.root, target)
                tensor = isinstance(value, torch.Tensor)
                return self.fake_mode.from_tensor(value) if tensor else value
            args, kwargs = map_aggregate(args, concrete), map_aggregate(kwargs, concrete)
            with self.fake_mode:
                if kind == "call_function":
                    return target(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                if value is not None:  # it cannot be had here: made for real
                    return self.fake_mode.from_tensor(value)
                return MODULE_CALL(self.root.get_submodule(target), *args, **kwargs)
        finally:
            self._executing = was

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = where_called(
            self._modules_entered[-1] if self._modules_entered else ""
        )
        node.meta[NUMBER] = self._count
        self._count += 1
        node.meta.pop("nn_module_stack", None)
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) is ValueProxy:
            return a.node
        if isinstance(a, np.generic):  # its repr would need numpy in the graph's code
            return a.item()
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor):
            proxy = self._attribute(a)
            if type(proxy) is not ValueProxy:
                raise NotImplementedError(
                    "a tensor that is no parameter, buffer or attribute of any module"
                )
            return proxy.node
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            return self._build(type(a), (), {k: self.create_arg(v) for k, v in _given(a)})
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self._build(type(a), tuple(map(self.create_arg, a)), {})
        if isinstance(a, dict) and type(a) is not dict:
            return self._build(type(a), (super().create_arg(dict(a)),), {})
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            if isinstance(a, tuple | list | dict | slice):
                raise  # something in it has said what is wrong
            raise NotImplementedError(
                f"a {type(a).__name__} in an output or a call; if the host keeps a cache, turn it "
                "off (config.use_cache = False)"
            ) from error

    def _build(self, kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A node that makes an output object; nothing reads its value while tracing."""
        node = self.create_node("call_function", kind, args, kwargs)
        node.meta["val"] = None
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        return own and not isinstance(m, CONTAINERS) and type(m) not in DECOMPOSED

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.submodule_paths.get(m)  # type: ignore[union-attr]
        if path is None:  # made inside forward (a loss module): its own calls are recorded
            return forward(*args, **kwargs)
        start = self._count
        self._modules_entered.append(path)
        try:
            if self.is_leaf_module(m, path) and _holds_tensor((args, kwargs)):
                output = self.create_proxy("call_module", path, args, kwargs)
            else:
                output = self._inside(m, path, forward, args, kwargs)
            self._failed_in = ""
        except Exception:
            self._failed_in = self._failed_in or path
            raise
        finally:
            self._modules_entered.pop()
        first = output[0] if type(output) in (tuple, list) and output else output
        made = first.node if type(first) is ValueProxy else None
        given = tuple(v.node for v in (*args, *kwargs.values()) if _is_tensor(v))
        self.calls.append(RecordedCall(path, given, made, start, self._count))
        return output

    def _inside(
        self,
        m: nn.Module,
        path: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace through a module; or make it one node, if its code decides by what tensors hold
        and it returns one tensor with a row for each image."""
        if m is self.root:
            return forward(*args, **kwargs)
        start, specialized = self._count, len(self.specialized)
        try:
            return forward(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            refusal = failed_at(error, self._failed_in or path)
            self._forget(start, specialized)
            was, self._executing = self._executing, True
            try:
                value = run_on_example(self.root, self.graph, self._example, m, args, kwargs)
            finally:
                self._executing = was
            first = next(v for v in self._example.values() if isinstance(v, torch.Tensor))
            if not isinstance(value, torch.Tensor) or value.shape[:1] != first.shape[:1]:
                raise
        output = self.create_proxy("call_module", path, args, kwargs, value=value)
        output.node.meta[OPAQUE] = refusal
        rest = tuple(value.shape[1:])
        return self.create_proxy("call_function", as_traced, (output, rest), {})

    def _forget(self, start: int, specialized: int) -> None:
        """Take back what was recorded from node number `start` on."""
        for node in reversed(self.graph.nodes):
            if node.meta[NUMBER] < start:
                break
            self.graph.erase_node(node)
        known = set(self.graph.nodes)
        self._attributes = {n: p for n, p in self._attributes.items() if p.node in known}
        self.calls = [call for call in self.calls if call.start < start]
        del self.specialized[specialized:]

    def failed_at(self, error: BaseException) -> Any:
        """The line of the host's source that led to `error`."""
        return failed_at(error, self._failed_in)


def _is_tensor(value: Any) -> bool:
    return type(value) is ValueProxy and isinstance(value.val, torch.Tensor)
