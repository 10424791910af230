"""torch's own functions while a host is traced: those that no proxy may enter are patched.

A function mode sees most calls with a proxy. It does not see those of C code that reads arguments
first and takes a proxy for the tensor or the number that it says it is.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, autograd
from torch.overrides import TorchFunctionMode, handle_torch_function, is_tensor_method_or_property

from tokenprune.private import TensorBase, built_in_functions, function_mode, without_function_mode
from tokenprune.tracing.flex import flex_attention_opened
from tokenprune.tracing.proxy import ValueProxy

__all__ = ["calls_let_through", "functions_recorded", "uncompiled"]

# Functions that make a tensor out of plain numbers: their C argument parser would turn a symbolic
# size into an int before any mode sees the call. Recorded whatever they are given.
FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
    *("as_tensor", "meshgrid", "from_numpy", "normal"),
)
# torch's other functions, recorded when given a proxy: where a number or a tensor is taken in one
# place, their C argument parser believes a proxy that it is a tensor, reads it, and crashes.
BUILT_IN = tuple(
    name
    for name in dir(built_in_functions)
    if not name.startswith(("_", "is_", "get_"))
    and name not in (*FACTORIES, "result_type", "can_cast", "promote_types")
    and isinstance(getattr(torch, name, None), BuiltinFunctionType)
)
# The same of those whose numbers and flags torch 2.8 looks at before any mode sees the call.
OF_F = tuple(
    name
    for name in dir(F)
    if isinstance(getattr(F, name), BuiltinFunctionType) and not name.startswith(("_", "has_"))
)
# Never nodes: answers about a tensor that are plain Python, properties of a real tensor, modes.
UNRECORDED = ("dim", "__get__", "__set__", "_set_grad_enabled", "_parse_to")
UNRECORDED_PREFIXES = ("is_", "_has", "get_")
# Methods of real tensors, recorded when given a proxy: their C argument parsers read it first.
METHODS = (
    *("__getitem__", "__setitem__"),
    *(
        name
        for name, method in vars(TensorBase).items()
        if isinstance(method, MethodDescriptorType)
        and not name.startswith(("_", *UNRECORDED_PREFIXES))
        and name not in UNRECORDED
    ),
)
CHECK_WITH = torch._check_with
SIZE = torch.Size
ATTENTION = F.multi_head_attention_forward
APPLY: Any = inspect.getattr_static(autograd.Function, "apply")


class Recorder(Protocol):
    """A tracer. If `executing`, calls run as they are; if `elsewhere`, this thread has no trace."""

    @property
    def executing(self) -> bool: ...

    @property
    def elsewhere(self) -> bool: ...

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


class _Calls(TorchFunctionMode):
    """Turns each torch call that the host makes outside a leaf into a node."""

    def __init__(self, tracer: Recorder) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        unrecorded = name in UNRECORDED or name.startswith(UNRECORDED_PREFIXES)
        if self.tracer.executing or unrecorded:
            return func(*args, **kwargs)
        _check_own(func)
        if is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


def calls_let_through() -> AbstractContextManager[Any]:
    """Leave out the mode that records calls while values are computed: being asked costs time."""
    ours = isinstance(function_mode(), _Calls)  # type: ignore[no-untyped-call]
    return without_function_mode() if ours else nullcontext()


def _check_own(function: Any) -> None:
    """Refuse a function of torch that another one has replaced, and that calls it: torch's own says
    by its name who it is."""
    asks, calls = sys._getframe(2).f_code, sys._getframe(3).f_code
    module = getattr(function, "__module__", "") or ""
    if asks is not handle_torch_function.__code__ or module.partition(".")[0] == "torch":
        return
    if getattr(function, "__code__", calls) is not calls:
        name = f"{module}.{getattr(function, '__qualname__', '?')}"
        raise NotImplementedError(
            f"{name} was put in the place of torch's {calls.co_name} and calls it; call it in the "
            "host itself instead"
        )


@contextmanager
def functions_recorded(tracer: Recorder) -> Iterator[None]:
    """Make nodes of `tracer` of the calls of torch's functions."""
    is_tensor_method_or_property(Tensor.add)  # torch keeps a list of its functions: not of patches
    with ExitStack() as stack:
        # what an owner has put in their place is Python code, and is traced through
        built_in = [name for name in BUILT_IN if _is_built_in(torch, name)]
        functions = {name: _recorded(tracer, torch, name) for name in (*FACTORIES, *built_in)}
        of_f = {name: _recorded(tracer, F, name) for name in OF_F if _is_built_in(F, name)}
        # methods are of a class of C: attributes of `Tensor` hide them
        hidden = [name for name in METHODS if name not in vars(Tensor)]
        methods = {name: _recorded_method(tracer, name) for name in hidden}
        stack.enter_context(_replaced(torch, functions))
        stack.enter_context(_replaced(F, of_f))
        stack.enter_context(_replaced(Tensor, methods))
        stack.enter_context(mock.patch.object(F, ATTENTION.__name__, _attention_opened(tracer)))
        stack.enter_context(flex_attention_opened(tracer))
        stack.enter_context(mock.patch.object(torch, "_check_with", _check_with))
        stack.enter_context(mock.patch.object(torch, "Size", _Size))
        stack.enter_context(mock.patch.object(torch.jit.ScriptFunction, "__call__", _inside))
        stack.enter_context(uncompiled())
        no_gradient = classmethod(_no_custom_gradient(tracer))
        stack.enter_context(mock.patch.object(autograd.Function, "apply", no_gradient))
        stack.enter_context(_Calls(tracer))
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """Run the Python code of what `torch.compile` has made: no proxy can enter the compiled one."""
    loaded = "torch._dynamo" in sys.modules  # else nothing was compiled
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _is_built_in(owner: Any, name: str) -> bool:
    return isinstance(getattr(owner, name, None), BuiltinFunctionType)


def _recorded(tracer: Recorder, owner: Any, name: str) -> Callable[..., Any]:
    original, makes = getattr(owner, name), name in FACTORIES

    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.executing or not (makes or _holds_proxy(args) or _holds_proxy(kwargs)):
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", original, args, kwargs)

    return record


@contextmanager
def _replaced(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """`mock.patch.object` for hundreds of attributes at once, in a tenth of its time."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            elif name in vars(owner):
                delattr(owner, name)


def _recorded_method(tracer: Recorder, name: str) -> Callable[..., Any]:
    original = getattr(TensorBase, name)

    @wraps(original, assigned=("__name__", "__doc__"), updated=())
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.executing or not (_holds_proxy(args) or _holds_proxy(kwargs)):
            return original(*args, **kwargs)
        return tracer.create_proxy("call_method", name, args, kwargs)

    return record


def _attention_opened(tracer: Recorder) -> Callable[..., Any]:
    """torch's functional attention, step by step: as one node, its softmax could not be masked."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        if tracer.executing:
            return ATTENTION(*args, **kwargs)
        with mock.patch.object(F, "has_torch_function", return_value=False):
            return ATTENTION(*args, **kwargs)

    return attend


def _check_with(kind: Any, condition: Any, message: Any = None) -> None:
    """torch's own assertion, which takes no proxy for a bool."""
    CHECK_WITH(kind, bool(condition), message)


class _SizeClass(type):
    """`torch.Size`, but made of proxies it is a tuple: the class itself would read them."""

    def __call__(cls, sizes: Iterable[Any] = ()) -> Any:
        given = tuple(sizes)
        return given if _holds_proxy(given) else SIZE(given)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, SIZE)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, SIZE)


class _Size(metaclass=_SizeClass):
    pass


def _holds_proxy(value: Any) -> bool:
    if type(value) in (tuple, list):
        return any(map(_holds_proxy, value))
    if type(value) is dict:
        return any(map(_holds_proxy, value.values()))
    if type(value) is slice:
        return any(map(_holds_proxy, (value.start, value.stop, value.step)))
    return type(value) is ValueProxy


def _inside(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the Python source of a scripted function: proxies cannot enter its compiled code."""
    return function._torchdynamo_inline(*args, **kwargs)


def _no_custom_gradient(tracer: Recorder) -> Callable[..., Any]:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.elsewhere:
            return APPLY.__get__(None, cls)(*args, **kwargs)
        raise NotImplementedError("a torch.autograd.Function, whose gradient no graph can hold")

    return apply
