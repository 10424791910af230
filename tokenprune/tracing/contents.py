"""What an object holds that no attribute access shows, and what `==` does not tell of it."""

import logging
import math
import threading
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from functools import partial, wraps
from numbers import Number
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import numpy as np
import torch
from torch import nn

__all__ = [
    "ABSENT",
    "MOST",
    "MOST_BYTES",
    "beyond",
    "can_be_set",
    "container_of",
    "disguises",
    "equal",
    "flat",
    "has_kinds",
    "has_slots_alone",
    "held_in_slots",
    "in_class",
    "is_constant",
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
MOST_BYTES = 1 << 20  # of an array whose values are watched
PLAIN = {bool, int, float, str, type(None)}
NUMBERS = PLAIN | {bytes, complex, slice, torch.dtype, torch.device, torch.Size}
ATOMS = NUMBERS | {type, nn.Parameter}
CONTAINERS = (list, tuple, deque, set, frozenset, dict)
CLOSED = (torch.Tensor, nn.Module, str, type)  # objects that are not looked into
STATES = (
    *(
        FunctionType,
        partial,
        SimpleNamespace,
        threading.local,
        UserDict,
        UserList,
        MappingProxyType,
    ),
    *(WeakValueDictionary, WeakKeyDictionary, defaultdict, ChainMap, bytearray, array, ref, Enum),
    *(logging.Logger, threading.Event, ContextVar, np.ndarray),
)  # of which `state_of` knows what they hold
NEVER_WATCHED = (nn.Module, torch.Tensor, type, Enum, FunctionType, MethodType, ModuleType)
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class whose attributes can be set,
IMMUTABLE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE: unless it says that they cannot, as Cython's do
NOT_WATCHED = {"torch", "numpy", "collections", "functools", "logging", "threading", "typing"}
NOT_WATCHED |= {"weakref", "contextlib"}  # what torch itself uses while it traces
OURS = ("tokenprune.tracing.", "tokenprune.runtime.")
CLASS = vars(object)["__class__"]


def snapshot(value: Any) -> Any:
    """A value that later equals `value` as long as nothing in its lists, sets and dicts changes."""
    kind = container_of(type(value))
    if kind in (list, tuple, set, deque):  # a NamedTuple equals a tuple
        return kind(map(snapshot, kind.__iter__(value)))
    if kind is dict:
        kept = dict(dict.items(value))  # threads may add some; a class may make what it returns
        return {key: snapshot(entry) for key, entry in kept.items()}
    return value


def equal(now: Any, then: Any) -> bool:
    """Whether two values are the same to a host's code: the very same one, equal, or both NaN."""
    if now is then:
        return True
    if isinstance(now, np.ndarray) and isinstance(then, np.ndarray):
        return now.dtype == then.dtype and bool(state_of(now) == state_of(then))
    if isinstance(now, float) and now != now:
        return isinstance(then, float) and then != then
    return bool(now == then)


def in_class(cls: type, name: str, absent: Any) -> Any:
    """What a class has by a name, as it is kept there: `getattr` would call a descriptor."""
    for base in cls.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return absent


def container_of(cls: type) -> Any:
    """The container of Python's that a class is or derives from; the class itself if it is none."""
    if cls in CONTAINERS or cls in PLAIN:
        return cls
    return next((kind for kind in CONTAINERS if issubclass(cls, kind)), cls)


def kinds_of(value: Any) -> Any:
    """What `==` does not compare: types (`[1] == [1.0]`), the order of a dict, the sign of 0.0, and
    which object of a class of the host's own it is. A type if there is no more to say; of what
    derives from a container that container, as in a `snapshot`."""
    if isinstance(value, dict):
        keys = OrderedDict.keys(value) if isinstance(value, OrderedDict) else dict.keys(value)
        return [*keys, *map(kinds_of, dict.values(value))]
    if isinstance(value, list | tuple | deque):
        types = list(map(type, value))
        plain = PLAIN.issuperset(types) and not (float in types and 0 in value)
        return types if plain else [*map(container_of, types), *map(kinds_of, value)]
    if isinstance(value, set | frozenset):
        return set(map(type, value))
    if type(value) is float:
        return math.copysign(1, value) if value == 0 else float
    return id(value) if _compares(type(value)) else type(value)


def may_mislead(value: Any) -> bool:
    """Whether something may equal a value that is not the same to a host's code."""
    if isinstance(value, dict):
        return len(value) > 1 or any(map(_misleads_inside, dict.values(value)))
    if isinstance(value, list | tuple | deque | set | frozenset):
        return any(map(_misleads_inside, value))
    return _compares(type(value)) or (type(value) is float and value == 0)


def has_kinds(value: Any) -> bool:
    """Whether something of another kind may equal a value, or it may get another class."""
    if isinstance(value, (Number, np.generic, *CONTAINERS)) or type(value) is str:
        return True
    return bool(type(value).__flags__ & HEAP_TYPE) and not isinstance(value, NEVER_WATCHED)


def is_constant(value: Any) -> bool:
    """Whether nothing in a value can change: a number, or a tuple of numbers and words."""
    return type(value) in PLAIN or (type(value) is tuple and PLAIN.issuperset(map(type, value)))


def _misleads_inside(value: Any) -> bool:
    return isinstance(value, Number | np.generic) or may_mislead(value)


def _compares(cls: Any) -> bool:
    """Whether a class of the host's own says itself which of its objects are equal."""
    plain = cls.__eq__ is object.__eq__ or not cls.__flags__ & HEAP_TYPE
    return not plain and not issubclass(cls, Enum | type) and _is_own(cls)


def state_of(value: Any) -> Any:
    """What an object says that is no attribute access of a class that can be watched: of a
    function its closure and attributes. ABSENT if it is of no such kind."""
    if not _has_state(type(value)):
        return ABSENT
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [cells, vars(value), value.__defaults__ or (), value.__kwdefaults__ or {}]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, SimpleNamespace | threading.local):
        return vars(value)
    if isinstance(value, UserDict | UserList):
        return value.data
    if isinstance(value, MappingProxyType | WeakValueDictionary | WeakKeyDictionary):
        return dict(value)
    if isinstance(value, defaultdict):
        return [value.default_factory]
    if isinstance(value, ChainMap):
        return list(value.maps)
    if isinstance(value, bytearray | array):
        return [bytes(value)]
    if isinstance(value, ref):
        return [value()]
    if isinstance(value, Enum):  # its name and value do not change
        return {name: held for name, held in vars(value).items() if name[:1] != "_"}
    if isinstance(value, logging.Logger):
        return [value.getEffectiveLevel()]
    if isinstance(value, threading.Event):
        return [value.is_set()]
    if isinstance(value, ContextVar):
        return [value.get(ABSENT)]
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes() if value.nbytes <= MOST_BYTES else id(value)
    if has_slots_alone(type(value)):
        return held_in_slots(value)
    return ABSENT


def _of_class(asked: Callable[[type], bool]) -> Callable[[type], bool]:
    """Remembers what is asked of a class, as long as somebody has that class."""
    known = WeakKeyDictionary[type, bool]()

    @wraps(asked)
    def answer(cls: type) -> bool:
        found = known.get(cls)
        if found is None:
            found = known[cls] = asked(cls)
        return found

    return answer


@_of_class
def _is_closed(cls: type) -> bool:
    return issubclass(cls, CLOSED) or disguises(cls)


@_of_class
def _has_state(cls: type) -> bool:
    return not disguises(cls) and (issubclass(cls, STATES) or has_slots_alone(cls))


def has_slots_alone(cls: type) -> bool:
    """Whether objects of a host's own class keep what they hold in slots, and nowhere else."""
    heap = bool(cls.__flags__ & HEAP_TYPE)
    return heap and not cls.__dictoffset__ and bool(slots_of(cls)) and _is_own(cls)


def held_in_slots(value: Any) -> dict[str, Any]:
    """What is in the slots of an object."""
    return {name: getattr(value, name, ABSENT) for name in slots_of(type(value))}


def slots_of(cls: type) -> set[str]:
    """The attributes that objects of a class have room for."""
    found = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    return {name for given in found for name in ((given,) if isinstance(given, str) else given)}


STEPS, OBJECTS, MOST = 7, 100, 2000


def within(value: Any, depth: int = STEPS, most: int = OBJECTS) -> Iterator[Any]:
    """A value, and what containers, plain objects, functions and references in it hold: `depth`
    steps deep, and `most` objects; numbers and words are left out."""
    if type(value) in ATOMS:
        yield value
        return
    seen, level = {id(value)}, [value]
    for _ in range(depth + 1):
        if not level:
            return
        yield from level
        inner = list[Any]()
        for each in (held for one in level for held in _inside(one)):
            if type(each) not in NUMBERS and id(each) not in seen and len(seen) < most:
                seen.add(id(each))
                inner.append(each)
        level = inner


def beyond(value: Any) -> list[Any]:
    """What is in a value that `within` does not reach; at most `MOST`."""
    reached = {id(inner) for inner in within(value)}
    if len(reached) < STEPS:
        return []
    return [inner for inner in within(value, depth=MOST, most=MOST) if id(inner) not in reached]


def flat(table: Any) -> Iterator[Any]:
    """What is in a table, less numbers and words."""
    values = dict.values(table) if isinstance(table, dict) else table
    return (value for value in values if type(value) not in NUMBERS)


def _inside(value: Any) -> Iterable[Any]:
    if type(value) in ATOMS or _is_closed(type(value)):
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
    return [v for each in held for v in _flat(each)]


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return dict.values(value)
    return value if isinstance(value, list | tuple) else (value,)


@_of_class
def may_be_watched(cls: type) -> bool:
    """Whether objects of a class are a host's own: a config, say, which its code reads."""
    plain = issubclass(cls, NEVER_WATCHED) or disguises(cls)
    if plain or not can_be_set(cls) or not hasattr(cls, "__dict__"):
        return False
    has_dict = cls.__dictoffset__ != 0
    return has_dict and _is_own(cls)


def disguises(cls: type) -> bool:
    """Whether objects of a class say themselves of which class they are: a `Mock`, a proxy. They
    answer for another, or whatever they are asked, so that no look at them finds an end."""
    return in_class(cls, "__class__", CLASS) is not CLASS and not str(cls.__module__).startswith(
        OURS
    )


def can_be_set(cls: type) -> bool:
    """Whether attributes of a class itself can be set."""
    return cls.__flags__ & (HEAP_TYPE | IMMUTABLE) == HEAP_TYPE


def _is_own(cls: type) -> bool:
    file: Any = cls.__module__
    if not isinstance(file, str):  # of Cython's functions it is each function's own
        return False
    return file.partition(".")[0] not in NOT_WATCHED and not file.startswith(OURS)
