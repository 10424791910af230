"""Tensors that a host takes from elsewhere than the attributes of its modules.

A list or a plain object that a module holds, a global, a closure: the graph looks such a tensor up
where the host's own code would, in each call. So it is the one that is there by then.
"""

import gc
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tokenprune.tracing.asked import GETATTR
from tokenprune.tracing.provenance import of_host

__all__ = ["Lookup", "Place", "find", "look_up", "named_tensors"]

Step = tuple[Callable[[Any, Any], Any], Any]
KEYS = (str, int, float, bool, type(None))
DEEPEST, MOST = 5, 20_000
OF_MODULES = {*vars(nn.Module()), "training"}


class Lookup:
    """A node's target: reads a global or a variable of a closure when the graph runs."""

    def __init__(self, name: str, namespace: dict[str, Any] | CellType) -> None:
        self.name, self.namespace = name, namespace
        self.__name__ = self.__qualname__ = name  # what the code of a graph calls it

    def __call__(self) -> Any:
        if isinstance(self.namespace, CellType):
            return self.namespace.cell_contents
        return self.namespace[self.name]


class Place(NamedTuple):
    """Where a tensor is: the path of an attribute of the host, or a `Lookup`; then the steps."""

    start: str | Lookup
    steps: tuple[Step, ...]


def named_tensors(root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """The tensors that modules hold, plain attributes included: module, its path, name, tensor."""
    for path, module in root.named_modules():
        held = {**vars(module), **module._buffers, **module._parameters}
        for name, value in held.items():
            if isinstance(value, Tensor):
                yield module, path, name, value


class Recorder(Protocol):
    """A tracer."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


def look_up(tracer: Recorder, thing: Any, place: Place | None) -> Any:
    """A proxy that looks `thing` up where it is, in each call."""
    if place is None:
        of_module = isinstance(thing, nn.Parameter | nn.Module)
        remedy = f"Register {'its module (nn.ModuleList)' if of_module else 'it as a buffer'}"
        raise NotImplementedError(
            f"a {type(thing).__name__} that no module, global or closure of the host holds, so "
            f"that no later call can find it. {remedy}"
        )
    kind = "get_attr" if isinstance(place.start, str) else "call_function"
    found = tracer.create_proxy(kind, place.start, (), {})
    for step, key in place.steps:
        found = tracer.create_proxy("call_function", step, (found, key), {})
    return found


def find(root: nn.Module, thing: Any) -> Place | None:
    """Where the host's code that is running can have read `thing`; None if nowhere."""
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        held = {**_of_class(type(module)), **vars(module)}
        starts = [(prefix + n, v) for n, v in held.items() if n not in OF_MODULES]
        found = _search(starts, thing, frozenset())
        if found is not None:
            return found
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code, names = frame.f_code, frozenset(frame.f_code.co_names)
        if of_host(code.co_filename):
            scope = frame.f_globals
            starts = [(Lookup(n, scope), scope[n]) for n in code.co_names if n in scope]
            inner = [(n, frame.f_locals[n]) for n in code.co_freevars if n in frame.f_locals]
            starts += [(Lookup(n, cell), v) for n, v in inner for cell in _cells(code, n, v)]
            found = _search(starts, thing, names)
            if found is not None:
                return found
        frame = frame.f_back
    return None


def _search(starts: list[tuple[Any, Any]], thing: Any, names: frozenset[str]) -> Place | None:
    """Breadth first, so that the shortest way is found."""
    queue = deque([(Place(start, ()), value) for start, value in starts])
    seen = set[int]()
    while queue and len(seen) < MOST:
        place, value = queue.popleft()
        if value is thing:
            return place
        if id(value) in seen or len(place.steps) == DEEPEST:
            continue
        seen.add(id(value))
        for step, inner in _inside(value, names):
            queue.append((Place(place.start, (*place.steps, step)), inner))
    return None


def _inside(value: Any, names: frozenset[str]) -> Iterator[tuple[Step, Any]]:
    """What an object holds, each with the step there. Of Python modules and classes only what the
    code that is running names."""
    if isinstance(value, dict):
        yield from (((operator.getitem, k), v) for k, v in value.items() if type(k) in KEYS)
    elif isinstance(value, tuple | list):
        yield from (((operator.getitem, i), v) for i, v in enumerate(value))
    elif isinstance(value, ModuleType | type):
        yield from (((GETATTR, n), vars(value)[n]) for n in names if n in vars(value))
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor | FunctionType):
        yield from (((GETATTR, n), v) for n, v in dict(vars(value)).items())


def _of_class(kind: type) -> dict[str, Any]:
    """The class attributes of a host's module that may hold tensors."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith(("torch.", "builtins")):
            data = dict(vars(base)).items()
            found |= {n: v for n, v in data if isinstance(v, Tensor | tuple | list | dict)}
    return found


def _cells(code: CodeType, name: str, value: Any) -> Iterator[CellType]:
    """The cell that holds a variable of a closure: functions know it, frames do not."""
    place = code.co_freevars.index(name)
    for function in gc.get_referrers(code):
        if isinstance(function, FunctionType) and function.__closure__:
            cell = function.__closure__[place]
            if cell != CellType() and cell.cell_contents is value:
                yield cell
                return
