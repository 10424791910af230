"""Which attributes of modules, and of what they hold, Python reads while a host is traced."""

import sys
import threading
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import partial
from io import IOBase
from numbers import Number
from types import CellType, FrameType, FunctionType, MappingProxyType, MethodType, SimpleNamespace
from typing import Any
from weakref import ProxyType, WeakValueDictionary, ref

import numpy as np
import torch
from torch import nn

from tokenprune.tracing.provenance import of_host

__all__ = [
    "ABSENT",
    "Reads",
    "kinds_of",
    "may_be_watched",
    "may_mislead",
    "slots_of",
    "snapshot",
    "state_of",
    "within",
]

ABSENT = object()
"""Stands for an attribute that there is not."""
# What torch itself keeps on a module. Hooks and tensors are watched in ways of their own.
OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_modules"} | {"_compiled_call_impl"}
TABLES = ("_parameters", "_buffers")
# Methods of torch that go through those tables.
WALKS = frozenset(
    {"parameters", "named_parameters", "buffers", "named_buffers", "_named_members", "<lambda>"}
    | {"state_dict", "_save_to_state_dict", "__dir__"}
)
LOOKUP = "__getattribute__"
MOST_BYTES = 1 << 20  # of an array whose values are watched
PLAIN = {bool, int, float, str, type(None)}
MOST, DEPTH = 2000, 7  # how many objects that a value holds are watched, and how deep
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class whose attributes can be set
NOT_WATCHED = {"torch", "numpy", "collections", "functools", "logging", "threading", "typing"}
OURS = ("tokenprune.tracing.", "tokenprune.runtime.")


def snapshot(value: Any) -> Any:
    """A value that later equals `value` as long as nothing in its lists, sets and dicts changes."""
    if type(value) in (list, tuple, set, deque):
        return type(value)(map(snapshot, value)) if value else type(value)()
    if isinstance(value, list):
        return list(map(snapshot, value))
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in dict(value).items()}  # threads may add some
    return value


def kinds_of(value: Any) -> Any:
    """What `==` does not compare: types (`[1] == [1.0]`), the order of a dict, and which object
    of a class of the host's own it is. A type if there is no more to say."""
    if isinstance(value, dict):
        return [*value, *map(kinds_of, value.values())]
    if isinstance(value, list | tuple | deque):
        types = list(map(type, value))
        return types if PLAIN.issuperset(types) else [*types, *map(kinds_of, value)]
    if isinstance(value, set | frozenset):
        return set(map(type, value))
    return id(value) if _compares(type(value)) else type(value)


def may_mislead(value: Any) -> bool:
    """Whether something may equal a value that is not the same to a host's code."""
    if isinstance(value, dict):
        return len(value) > 1 or any(map(_misleads_inside, value.values()))
    if isinstance(value, list | tuple | deque | set | frozenset):
        return any(map(_misleads_inside, value))
    return _compares(type(value))


def _misleads_inside(value: Any) -> bool:
    return isinstance(value, Number | np.generic) or may_mislead(value)


def _compares(cls: Any) -> bool:
    """Whether a class of the host's own says itself which of its objects are equal."""
    plain = cls.__eq__ is object.__eq__ or not cls.__flags__ & HEAP_TYPE
    return not plain and not issubclass(cls, Enum | type) and _is_own(cls)


def state_of(value: Any) -> Any:
    """What an object says that is no attribute access of a class that can be watched: of a
    function its closure and attributes. ABSENT if it is of no such kind."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [cells, vars(value), value.__defaults__ or (), value.__kwdefaults__ or {}]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, SimpleNamespace | threading.local):
        return vars(value)
    if isinstance(value, UserDict | UserList):
        return value.data
    if isinstance(value, MappingProxyType | WeakValueDictionary):
        return dict(value)
    if isinstance(value, ChainMap):
        return list(value.maps)
    if isinstance(value, bytearray | array):
        return [bytes(value)]
    if isinstance(value, ref):
        return [value()]
    if isinstance(value, threading.Event):
        return [value.is_set()]
    if isinstance(value, ContextVar):
        return [value.get(ABSENT)]
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes() if value.nbytes <= MOST_BYTES else id(value)
    if (
        type(value).__flags__ & HEAP_TYPE
        and not hasattr(value, "__dict__")
        and _is_own(type(value))
    ):
        return {name: getattr(value, name, ABSENT) for name in slots_of(type(value))}
    return ABSENT


def slots_of(cls: type) -> set[str]:
    """The attributes that objects of a class have room for."""
    found = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    return {name for given in found for name in ((given,) if isinstance(given, str) else given)}


class Reads:
    """The first value of everything that was read, before the host's own code changed it.

    Attributes:
        objects: The modules and other objects, by id.
        values: (id, name) -> a snapshot of the value that the object itself had.
        inherited: (id, name) of what came from an object's class.
        children: (id, name) -> the child module.
        tensors: (id, name) of parameters and buffers, and of tensors that are plain attributes.
        missing: (id, name) of what was asked for and is not there (`hasattr`).
        tables: (id of a module, which of torch's tables) -> the names in it.
        held: id of an object that `state_of` knows -> it.
        opaque: what nobody can watch: name of an attribute -> the type of what is in it; function
            that asks the system -> the line of the host that calls it.
        places: id of a tensor -> all attributes of modules that hold it.
    """

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.values: dict[tuple[int, str], Any] = {}
        self.inherited: dict[tuple[int, str], None] = {}
        self.children: dict[tuple[int, str], nn.Module] = {}
        self.tensors: dict[tuple[int, str], None] = {}
        self.missing: dict[tuple[int, str], None] = {}
        self.held: dict[int, Any] = {}
        self.opaque: dict[str, str] = {}
        self.tables: dict[tuple[int, str], list[str]] = {}
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        self._patches = ExitStack()
        self._patched: set[type] = set()
        self._walked: dict[int, Any] = {}

    @contextmanager
    def recorded(
        self,
        paused: Callable[[], bool],
        runs_itself: Callable[[nn.Module], bool],
        handed: Callable[[Any], Any],
    ) -> Iterator[None]:
        """Record what is read inside.

        Args:
            paused: Whether what is read now does not count: another thread reads.
            runs_itself: Whether a module is no part of the trace but runs when a program does, so
                that only what decides about shapes matters, and no method.
            handed: What a module's code gets for a value that it reads.
        """
        self._paused, self._runs_itself, self._handed = paused, runs_itself, handed
        with self._patches:
            self._watch(nn.Module)
            try:
                yield
            finally:
                self._walked.clear()

    def registered(self, module: nn.Module, name: str, value: Any) -> None:
        """Record a child, parameter or buffer, which no instance dict holds."""
        self.objects[id(module)] = module
        if isinstance(value, nn.Module):
            self.children.setdefault((id(module), name), value)
        elif isinstance(value, torch.Tensor):
            self.tensors[id(module), name] = None

    def asked(self, function: str, file: str, line: int) -> None:
        """Record that a line of the host asks the system something."""
        self.opaque[function] = f"{file}:{line}"

    def lacked(self, owner: Any, name: str) -> None:
        """Record that an object has no such attribute."""
        if not name.startswith("__"):
            self.objects[id(owner)] = owner
            self.missing[id(owner), name] = None

    def shared(self) -> list[list[tuple[nn.Module, str]]]:
        """The attributes that hold one tensor, of which one was read: a trace reads it in one
        place."""
        several = [places for places in self.places.values() if len(places) > 1]
        return [p for p in several if any((id(m), name) in self.tensors for m, name in p)]

    def inherits(self, owner: Any, name: str) -> None:
        """Record that an object has an attribute by its class."""
        self.objects[id(owner)] = owner
        self.inherited[id(owner), name] = None

    def functions(self) -> list[Any]:
        """What of it may have been called: methods, and functions kept in attributes."""
        classes = {(type(self.objects[i]), name) for i, name in self.inherited}
        return [getattr(cls, name, None) for cls, name in classes] + list(self.values.values())

    def forget(self, of_trace: Callable[[Any], bool]) -> None:
        """Leave out values that hold something of the trace: the forward had written those."""
        self.values = {key: value for key, value in self.values.items() if not of_trace(value)}

    def _add(self, owner: Any, name: str, value: Any) -> None:
        self.objects[id(owner)] = owner
        key, own = (id(owner), name), object.__getattribute__(owner, "__dict__")
        if _is_opaque(value):
            self.opaque[f"{type(owner).__name__}.{name}"] = type(value).__name__
        if id(value) not in self._walked:
            self._walked[id(value)] = value
            for inner in within(value, DEPTH, MOST):
                self._hold(inner)
        if name not in own:
            module = isinstance(owner, nn.Module)
            of_torch = module and getattr(nn.Module, name, ABSENT) is getattr(type(owner), name, 0)
            if not of_torch and not (module and self._runs_itself(owner)):
                self.inherited[key] = None
        elif isinstance(value, torch.Tensor):
            self.tensors[key] = None
            places = self.places.get(id(value), [])
            if places and (owner, name) not in places:
                places.append((owner, name))
        elif key not in self.values:
            self.values[key] = snapshot(value)

    def _hold(self, value: Any) -> None:
        """Record an object that is not watched by its class, or watch its class."""
        if isinstance(value, MethodType):
            self._hold(value.__self__)
            value = value.__func__
        if isinstance(value, partial):
            self._hold(value.func)
        if may_be_watched(type(value)):
            self._watch(type(value))
        elif id(value) not in self.held and state_of(value) is not ABSENT:
            self.held[id(value)] = value

    def _watch(self, cls: type) -> None:
        """Record the reads of every object of `cls` from now on."""
        if cls in self._patched:
            return
        self._patched.add(cls)
        read: Callable[[Any, str], Any] = getattr(cls, LOOKUP)

        def recorded(owner: Any, name: str) -> Any:
            try:
                value = read(owner, name)
            except AttributeError:
                if not isinstance(owner, nn.Module) and not self._paused():
                    made_up = hasattr(type(owner), "__getattr__") and name[:2] != "__"
                    (self.inherits if made_up else self.lacked)(owner, name)
                raise
            if name == "__dict__" and not self._paused() and _asked_by_host():
                for each in value.keys() - OF_TORCH:
                    self._add(owner, each, value[each])
            if name in TABLES and not self._paused() and _asked_by_host(through=WALKS):
                self.objects[id(owner)] = owner
                self.tables[id(owner), name] = list(value)
            if not (name.startswith("__") or name in OF_TORCH or self._paused()):
                self._add(owner, name, value)
                return self._handed(value) if isinstance(owner, nn.Module) else value
            return value

        before = vars(cls).get(LOOKUP, ABSENT)
        setattr(cls, LOOKUP, recorded)
        self._patches.callback(_put_back, cls, before)


def _is_opaque(value: Any) -> bool:
    """Whether what an object says cannot be watched: it moves, or is large."""
    if isinstance(value, IOBase):
        return not value.closed and value.readable()
    large = isinstance(value, np.ndarray) and value.nbytes > MOST_BYTES
    return large or isinstance(value, Iterator | ProxyType)


def _asked_by_host(through: frozenset[str] = frozenset()) -> bool:
    """Whether a line of the host asks, by functions of torch with these names too."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in through:
        frame = frame.f_back
    return frame is not None and of_host(frame.f_code.co_filename)


def within(value: Any, depth: int = 3, most: int = 100) -> Iterator[Any]:
    """A value, and what containers, plain objects, functions and references in it hold: `depth`
    steps deep, and `most` objects."""
    seen, level = {id(value)}, [value]
    for _ in range(depth + 1):
        yield from level
        inner = list[Any]()
        for each in (held for one in level for held in _inside(one)):
            if id(each) not in seen and len(seen) < most:
                seen.add(id(each))
                inner.append(each)
        level = inner


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, torch.Tensor | nn.Module | str | type):
        return ()
    if may_be_watched(type(value)):
        return list(vars(value).values())
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    state = {"": value} if isinstance(value, dict) else state_of(value)
    if state is ABSENT:
        return ()
    held = state.values() if isinstance(state, dict) else state
    return [v for each in held for v in (each.values() if isinstance(each, dict) else _flat(each))]


def _flat(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _put_back(cls: type, before: Any) -> None:
    if before is ABSENT:
        delattr(cls, LOOKUP)
    else:
        setattr(cls, LOOKUP, before)


def may_be_watched(cls: type) -> bool:
    """Whether objects of a class are a host's own: a config, say, which its code reads."""
    plain = issubclass(cls, nn.Module | torch.Tensor | type | Enum | FunctionType | MethodType)
    if plain or not cls.__flags__ & HEAP_TYPE or not hasattr(cls, "__dict__"):
        return False
    has_dict = cls.__dictoffset__ != 0
    return has_dict and _is_own(cls)


def _is_own(cls: type) -> bool:
    file = cls.__module__
    return file.partition(".")[0] not in NOT_WATCHED and not file.startswith(OURS)
