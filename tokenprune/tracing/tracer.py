"""Trace a host's forward into a torch.fx graph, without running it for real.

`torch.fx.symbolic_trace` stops at the first `if`. Here proxies carry the value they had on an
example input (`proxy.ValueProxy`), computed under fake tensors: no memory and no arithmetic. Every
tensor operation outside a leaf is caught by a torch function mode, so tensors that a host makes
from plain numbers (`torch.arange(n)`) become nodes as well, not constants.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
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

from tokenprune.tracing.decompose import DECOMPOSED, is_leaf
from tokenprune.tracing.functions import functions_recorded
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.hooks import (
    Hooks,
    after_host_hooks,
    before_host_hooks,
    between_hooks,
    forward_of,
    is_away,
    next_hook,
    unhooked,
)
from tokenprune.tracing.interpret import evaluate, run, tensor_attribute, tensors_in
from tokenprune.tracing.opaque import OPAQUE, as_traced
from tokenprune.tracing.provenance import Provenance, failed_at, where_called
from tokenprune.tracing.proxy import ValueProxy, concrete
from tokenprune.tracing.state import attributes_kept, empty_caches

__all__ = ["NUMBER", "RecordedCall", "ValueTracer"]

MODULE_CALL = nn.Module.__call__
# Tracing patches torch for the whole process; calls of other threads pass through the patches.
ONE_AT_A_TIME = threading.RLock()
MODULE_GETATTR = nn.Module.__getattr__
NUMBER = "number"
"""Key in a node's `meta`: nodes are numbered in the order in which the host made them."""
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class RecordedCall(NamedTuple):
    """One call of a module: its tensor arguments, the first tensor it returned (None if there is
    none), and the numbers of the first node that it made and of the first one made after it."""

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
        self._modules_entered = [""]
        self._failed_in = ""
        self._example: Mapping[str, Any] = {}
        self._count = 0
        self.hooks = Hooks(root, since=next_hook())

    def record(self, forward: Callable[..., Any], example: Mapping[str, Any]) -> fx.Graph:
        """Trace `forward(**example)`: tensors become inputs, other values are specialized on."""
        self._example = example
        tensors = {name: v for name, v in example.items() if isinstance(v, torch.Tensor)}
        inputs = {n: self.create_proxy("placeholder", n, (), {}, v) for n, v in tensors.items()}
        with ONE_AT_A_TIME, self._patched(), attributes_kept(self.root):
            empty_caches(self.root)
            output = forward(**{**example, **inputs})
            self.create_node("output", "output", (self.create_arg(output),), {})
        return self.graph

    @contextmanager
    def _patched(self) -> Iterator[None]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.elsewhere:
                return MODULE_CALL(module, *args, **kwargs)
            if self.executing:
                return unhooked(module, args, kwargs)
            opened = DECOMPOSED.get(type(module))
            forward = partial(opened, module) if opened else forward_of(module)
            return self.call_module(module, forward, args, kwargs)

        def getattribute(module: nn.Module, name: str) -> Any:
            value = MODULE_GETATTR(module, name)
            if isinstance(value, torch.Tensor) and not self.executing:
                return self._attribute(value)
            return value

        calls = mock.patch.object(nn.Module, "__call__", call)
        attributes = mock.patch.object(nn.Module, "__getattr__", getattribute)
        with calls, attributes, torch.no_grad(), functions_recorded(self):
            yield

    @property
    def elsewhere(self) -> bool:
        """Whether this is another thread, which has nothing to do with the trace."""
        return threading.get_ident() != self._thread

    @property
    def executing(self) -> bool:
        """Whether calls run as they are instead of being recorded."""
        return self._executing or self.elsewhere

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        was, self._executing = self._executing, True
        try:
            yield
        finally:
            self._executing = was

    def _attribute(self, tensor: torch.Tensor) -> Any:
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def forget_attributes(self) -> None:
        """Read parameters and buffers again from here on."""
        self._attributes.clear()

    def specialize(self, node: fx.Node, convert: Callable[[Any], Any]) -> Any:
        """`convert` (bool, int, float, ...) applied to `node`'s value, which Python reads."""
        if self.executing:
            return convert(node.meta["val"])
        self.specialized.append(node)
        with self._unrecorded():
            return convert(node.meta["val"])

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Args, kwargs: Kwargs, value: Any = None, **options: Any
    ) -> Any:
        """A node and its value: of `value`, a real tensor, or else of what the node calls."""
        proxy = super().create_proxy(kind, target, args, kwargs, **options)
        proxy.node.meta["val"] = self._evaluate(kind, target, args, kwargs, value)
        return proxy

    def _evaluate(self, kind: str, target: Any, args: Args, kwargs: Kwargs, value: Any) -> Any:
        with self._unrecorded():
            if kind == "get_attr":
                value = tensor_attribute(self.root, target)
            if value is not None:
                tensor = isinstance(value, torch.Tensor)
                return self._as_fake(value) if tensor else value
            args, kwargs = map_aggregate(args, concrete), map_aggregate(kwargs, concrete)
            with self.fake_mode:
                if kind == "call_function":
                    return target(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return unhooked(self.root.get_submodule(target), args, kwargs)

    def _as_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a weight that is kept elsewhere, what it is when its module runs."""
        example = next((v for v in self._example.values() if isinstance(v, torch.Tensor)), tensor)
        if is_away(tensor) and not example.is_meta:
            with self.fake_mode:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=example.device)
        if tensor.grad_fn is not None:  # torch warns where it reads the gradient of such a tensor
            tensor = tensor.detach().requires_grad_()
        return self.fake_mode.from_tensor(tensor)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["where"] = where_called(self._modules_entered[-1])
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
            node = self.create_node("get_attr", self.path_of_module(a), (), {})
            node.meta["val"] = a
            return node
        if isinstance(a, torch.Tensor):
            proxy = self._attribute(a)
            if type(proxy) is not ValueProxy:
                raise NotImplementedError(
                    "a tensor that is no parameter, buffer or attribute of any module"
                )
            return proxy.node
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = [(f, getattr(a, f.name)) for f in dataclasses.fields(a) if f.init]
            said = {f.name: v for f, v in fields if v is not None or f.default is not None}
            return self._build(type(a), (), {k: self.create_arg(v) for k, v in said.items()})
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

    def _build(self, kind: type, args: Args, kwargs: Kwargs) -> fx.Node:
        """A node that makes an output object; nothing reads its value while tracing."""
        node = self.create_node("call_function", kind, args, kwargs)
        node.meta["val"] = None
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        path = self.submodule_paths.get(m)  # type: ignore[union-attr]
        if path is None:  # made inside forward (a loss module): its own calls are recorded
            return forward(*args, **kwargs)
        start = self._count
        self._modules_entered.append(path)
        try:
            if self.is_leaf_module(m, path) and tensors_in((args, kwargs)):  # not Identity()(None)
                output = self.create_proxy("call_module", path, args, kwargs)
                # what they return is not taken here: they run with the module
                before_host_hooks(self.hooks, m, args, kwargs)
                after_host_hooks(self.hooks, m, args, kwargs, output)
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
        given = [v for v in (*args, *kwargs.values()) if type(v) is ValueProxy]
        tensors = tuple(v.node for v in given if isinstance(v.val, torch.Tensor))
        self.calls.append(RecordedCall(path, tensors, made, start, self._count))
        return output

    def _inside(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """Trace through a module; or make it one node, if its code decides by what tensors hold
        and it returns one tensor with a row for each image."""
        if m is self.root:
            return forward(*args, **kwargs)
        start, specialized = self._count, len(self.specialized)
        try:
            return between_hooks(self, m, path, forward, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            refusal = failed_at(error, self._failed_in or path)
            self._forget(start, specialized)
            value = self._on_example(m, args, kwargs)
            first = next(v for v in self._example.values() if isinstance(v, torch.Tensor))
            if not isinstance(value, torch.Tensor) or value.shape[:1] != first.shape[:1]:
                raise
        output = self.create_proxy("call_module", path, args, kwargs, value)
        output.node.meta[OPAQUE] = refusal
        rest = tuple(value.shape[1:])
        return self.create_proxy("call_function", as_traced, (output, rest), {})

    def _on_example(self, m: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """A module's output on the example itself; the graph so far is run to get there."""
        with self._unrecorded():
            known = dict(run(self.root, self.graph, self._example, self._without_hooks))

            def real(argument: Any) -> Any:
                return known[argument.node] if type(argument) is ValueProxy else argument

            return m(*map_aggregate(args, real), **map_aggregate(kwargs, real))

    def _without_hooks(self, node: fx.Node, env: Any) -> Any:
        return None if is_hook_node(node) else evaluate(self.root, node, env)

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

    def failed_at(self, error: BaseException) -> Provenance:
        """The line of the host's source that led to `error`."""
        return failed_at(error, self._failed_in)
