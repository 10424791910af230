"""A torch.fx proxy that carries the value its node had on an example input.

Python's questions (`if`, `len`, `int`, unpacking) are answered from that value, so a host's
control flow needs no rewriting. Sizes stay symbolic in the graph. Each answer that Python turned
into a plain number is reported to the tracer (`specialize`), because the graph only holds for
inputs that give the same.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from tokenprune.tracing.asked import GETATTR
from tokenprune.tracing.effects import IN_PLACE
from tokenprune.tracing.modes import LAYOUT, MARKS

__all__ = ["CLASS", "ArrayReadError", "ValueProxy", "concrete"]

# What are constants of a trace, beside flags: they belong to the signature a graph is kept under.
CONSTANTS = frozenset(
    {"dtype", "device", "layout", "ndim", "itemsize", "dim", "ndimension", "element_size"}
    | {"is_floating_point", "is_complex", "get_device"}
)
# What Python asks about memory: the graph then holds for inputs that lie in it alike.
OF_LAYOUT = frozenset(
    {"stride", "is_contiguous", "storage_offset", "dim_order", "is_inference", "is_shared"}
    | {"_is_view"}
)
# What changes from call to call without that anybody sets it.
OF_STEPS = frozenset({"grad", "_version", "_base", "data_ptr", "untyped_storage"})

CLASS = "its class"  # no name that Python could write
"""Key in the `meta` of an input or a weight of a class derived from Tensor: that class."""


class ArrayReadError(NotImplementedError):
    """Python makes an array of NumPy's of what a tensor holds."""


class ValueProxy(fx.Proxy):
    """What the host's own Python code gets in place of a node's value."""

    @property
    def val(self) -> Any:
        return self.node.meta["val"]

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # `isinstance(x, torch.Tensor)` in a host's code must hold
        return cast(type, self.node.meta.get(CLASS) or type(self.node.meta["val"]))

    @property
    def requires_grad(self) -> bool:
        """Asked of autograd: `val` is computed without gradients."""
        return bool(self._with_gradients().requires_grad)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})

    @property
    def is_leaf(self) -> bool:
        return bool(self._with_gradients().is_leaf)

    @property
    def grad_fn(self) -> Any:
        return self._with_gradients().grad_fn

    @property
    def data(self) -> Any:
        tracer: Any = self.tracer
        return tracer.create_proxy("call_function", GETATTR, (self, "data"), {})

    @data.setter
    def data(self, value: Any) -> None:
        raise NotImplementedError("`tensor.data = ...`, which no graph can hold; use copy_()")

    def _with_gradients(self) -> torch.Tensor:
        value: torch.Tensor = self.tracer.with_gradients(self.node)  # type: ignore[attr-defined]
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # protocols that the value must not seem to answer
        tracer: Any = self.tracer
        if name == "numpy" and isinstance(self.val, torch.Tensor):
            self.__array__()
        if name in OF_STEPS and isinstance(self.val, torch.Tensor):
            raise NotImplementedError(
                f"`{name}` of a tensor, which is another in every step; read it outside of forward"
            )
        if self.node.op == "placeholder" and not hasattr(torch.Tensor, name):
            tracer.note_ambient(MARKS)
        try:
            found = getattr(self.val, name)
        except AttributeError:
            tracer.lacks(self.node, name)
            raise
        if name in OF_LAYOUT:
            tracer.note_ambient(LAYOUT)
        if name in CONSTANTS or isinstance(found, bool) or found is None:
            return found
        if not callable(found) or isinstance(found, torch.Tensor):
            return tracer.create_proxy("call_function", GETATTR, (self, name), {})

        def record(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_method", name, (self, *args), kwargs)

        return record

    def __call__(self) -> Any:
        """Python takes every proxy for callable: code that calls what is callable gets it back."""
        return self

    def _specialize(self, convert: Callable[[Any], Any]) -> Any:
        return self.tracer.specialize(self.node, convert)  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        return bool(self._specialize(bool))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.val, torch.Tensor):
            raise ArrayReadError("an array of NumPy's, made of a tensor")
        numbers = list(self) if isinstance(self.val, tuple) else self._specialize(type(self.val))
        return np.array(numbers, *args, **kwargs)

    def __int__(self) -> int:
        return int(self._specialize(int))

    def __index__(self) -> int:
        return int(self._specialize(operator.index))

    def __float__(self) -> float:
        return float(self._specialize(float))

    def __len__(self) -> int:
        if isinstance(self.val, torch.Tensor):
            return len(range(self.size(0)))
        return len(self.val)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.val, torch.Tensor | tuple | list):
            return iter([operator.getitem(self, i) for i in range(len(self))])
        if isinstance(self.val, dict):
            return iter(self.val)
        raise TypeError(f"{type(self.val).__name__} object is not iterable")

    def __contains__(self, item: Any) -> bool:
        return any(bool(entry == item) for entry in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __hash__(self) -> int:
        return hash(self.node)

    def __format__(self, spec: str) -> str:
        return format(str(self.val), spec)

    def __str__(self) -> str:
        return str(self.val)

    def __repr__(self) -> str:
        return f"ValueProxy({self.node.name})"

    def __round__(self, digits: int | None = None) -> Any:
        return self._specialize(lambda value: round(value, digits))


def _operator(name: str) -> Callable[[ValueProxy, Any], Any]:
    """Record an operator, but for a comparison with None or a word, which no tensor equals."""
    target = getattr(operator, name)

    def record(self: ValueProxy, other: Any) -> Any:
        if other is None or isinstance(other, str | torch.dtype | torch.device):
            return target(self.val, other)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in (*IN_PLACE, "eq", "ne"):
    setattr(ValueProxy, f"__{_name}__", _operator(_name))


def concrete(argument: Any) -> Any:
    """The value of one argument of a recorded call: containers are walked by the caller."""
    return argument.node.meta["val"] if type(argument) is ValueProxy else argument
