"""A torch.fx proxy that carries the value its node had on an example input.

Python's questions (`if`, `len`, `int`, unpacking) are answered from that value, so a host's
control flow needs no rewriting. Sizes stay symbolic in the graph. Each answer that Python turned
into a plain number is reported to the tracer (`specialize`), because the graph only holds for
inputs that give the same.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["ValueProxy", "concrete"]

# Attributes that are constants of a trace: they belong to the signature a graph is kept under.
CONSTANT_ATTRIBUTES = frozenset(
    {"dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_nested"}
    | {"is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "itemsize", "type"}
)
CONSTANT_METHODS = frozenset(
    {"dim", "ndimension", "is_floating_point", "is_complex", "element_size", "get_device"}
)


class ValueProxy(fx.Proxy):
    """Stands for a node's value while the host's own Python code runs."""

    @property
    def val(self) -> Any:
        return self.node.meta["val"]

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # `isinstance(x, torch.Tensor)` in a host's code must hold
        return type(self.node.meta["val"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # protocols that the value must not seem to answer
        found = getattr(self.val, name)
        if name in CONSTANT_ATTRIBUTES and not callable(found):
            return found
        if name in CONSTANT_METHODS:
            return found
        if callable(found) and not isinstance(found, torch.Tensor):
            return _Method(self, name)
        if isinstance(found, bool) or found is None:
            return found
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _specialize(self, convert: Callable[[Any], Any]) -> Any:
        return self.tracer.specialize(self.node, convert)  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        return bool(self._specialize(bool))

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


class _Method:
    """A method of a proxied value, recorded when called."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.tracer.create_proxy("call_method", self.name, (self.owner, *args), kwargs)


def _in_place(name: str) -> Callable[[ValueProxy, Any], Any]:
    target = getattr(operator, name)

    def record(self: ValueProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ior", "iand"):
    setattr(ValueProxy, f"__{_name}__", _in_place(_name))


def _compare(name: str) -> Callable[[ValueProxy, Any], Any]:
    target = getattr(operator, name)

    def record(self: ValueProxy, other: Any) -> Any:
        if other is None or isinstance(other, str | torch.dtype | torch.device):
            return target(self.val, other)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in ("eq", "ne"):
    setattr(ValueProxy, f"__{_name}__", _compare(_name))


def concrete(argument: Any) -> Any:
    """The value behind one argument of a recorded call: containers are walked by the caller."""
    return argument.node.meta["val"] if type(argument) is ValueProxy else argument
