"""Which attributes of modules, and of what they hold, Python reads while a host is traced."""

import builtins
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from io import IOBase
from types import CodeType, FrameType, MethodType, ModuleType
from typing import Any
from unittest import mock
from weakref import ProxyType

import numpy as np
import torch
from torch import nn

from tokenprune.tracing.asked import Asked
from tokenprune.tracing.contents import (
    ABSENT,
    MOST,
    MOST_BYTES,
    beyond,
    disguises,
    in_class,
    may_be_watched,
    snapshot,
    state_of,
    within,
)
from tokenprune.tracing.names import Reached, is_own_class, own_metaclasses
from tokenprune.tracing.outside import GENERATORS
from tokenprune.tracing.provenance import Drawn, of_host
from tokenprune.tracing.stand_ins import original

__all__ = ["OF_TORCH", "Reads"]

# What torch itself keeps on a module. Hooks and tensors are watched in ways of their own.
OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_modules"} | {"_compiled_call_impl"}
OF_PYTHON = frozenset(
    name
    for cls in vars(builtins).values()
    for name in (dir(cls) if isinstance(cls, type) else ())
    if name[:2] == "__"
)
"""What Python itself asks objects for; another name like `__gain__` is their own."""
TABLES = ("_parameters", "_buffers")
# Methods of torch that go through those tables.
WALKS = frozenset(
    {"parameters", "named_parameters", "buffers", "named_buffers", "_named_members", "<lambda>"}
    | {"state_dict", "_save_to_state_dict", "__dir__", "of_builtins"}
)
LOOKUP = "__getattribute__"
OF_DROPOUT = ("p", "training")
"""What `nn.Dropout` reads and no shape depends on."""


class Reads:
    """The first value of everything that was read, before the host's own code changed it.

    Attributes:
        objects: The modules and other objects, by id.
        values: (id, name) -> a snapshot of the value that the object itself had.
        inherited: (id, name) of what came from an object's class.
        children: (id, name) -> the child module.
        tensors: (id, name) of parameters and buffers, and of tensors that are plain attributes.
        deciding: (id, name) of buffers whose values Python asked for.
        missing: (id, name) of what was asked for and is not there (`hasattr`).
        tables: (id of a module, which of torch's tables) -> the names in it.
        leaves: id -> module of torch's that is one node.
        held: id of an object that `state_of` knows -> it.
        opaque: what nobody can watch: name of an attribute -> the type of what is in it; function
            that asks the system -> the line of the host that calls it.
        prints: Lines of the host that print.
        drawn: The first line that makes a generator without a seed.
        types: Lines that compare `type(...)` with a class of tensors.
        places: id of a tensor -> all attributes of modules that hold it.
        by_name: (id, name) -> the class or module of Python that was asked for a name that the code
            makes, or whose own class answers.
        spaces: id -> a class, a module of Python or the globals of a file: all its names count.
        imports: Names of modules of Python that were asked for.
        ran: Code that was made of a text -> its globals.
    """

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.values: dict[tuple[int, str], Any] = {}
        self.inherited: dict[tuple[int, str], None] = {}
        self.children: dict[tuple[int, str], nn.Module | None] = {}
        self.tensors: dict[tuple[int, str], None] = {}
        self.deciding: dict[tuple[int, str], None] = {}
        self.missing: dict[tuple[int, str], None] = {}
        self.leaves: dict[int, nn.Module] = {}
        self.held: dict[int, Any] = {}
        self.opaque: dict[str, str] = {}
        self.drawn: Drawn | None = None
        self.prints: list[str] = []
        self.types: list[str] = []
        self.tables: dict[tuple[int, str], list[str]] = {}
        self.places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.by_name: dict[tuple[int, str], Any] = {}
        self.spaces: dict[int, Any] = {}
        self.imports: dict[str, None] = {}
        self.ran: dict[CodeType, dict[str, Any]] = {}
        self._patches = ExitStack()
        self._patched: set[type] = set()
        self._asked: Asked | None = None
        self._walked: dict[int, Any] = {}

    @contextmanager
    def recorded(
        self,
        known: Reached,
        paused: Callable[[], bool],
        runs_itself: Callable[[nn.Module], bool],
        handed: Callable[[Any], Any],
    ) -> Iterator[None]:
        """Record what is read inside.

        Args:
            known: What the code may name.
            paused: Whether what is read now does not count: another thread reads.
            runs_itself: Whether a module is no part of the trace but runs when a program does, so
                that only what decides about shapes matters, and no method.
            handed: What a module's code gets for a value that it reads.
        """
        self._paused, self._runs_itself, self._handed = paused, runs_itself, handed
        with self._patches:
            self._watch(nn.Module)
            for cls in known.classes:
                self._watch_class_of(cls)
            for inner in (held for value in known.tables() for held in beyond(value)):
                if may_be_watched(type(inner)) and is_own_class(type(inner)):
                    self._watch(type(inner))
            for file in {id(place): place for place, _ in known.absent}.values():
                if isinstance(file, ModuleType) and "__getattr__" in vars(file):
                    self._watch_file(file)
            self._asked = Asked(self, paused)
            self._patches.enter_context(self._asked.noted())
            try:
                yield
            finally:
                self._walked.clear()

    def torch_runs(self, alone: bool) -> AbstractContextManager[None]:
        """While torch alone computes a value, no line of the host asks Python for anything."""
        return self._asked.noted(False) if alone and self._asked else nullcontext()

    def registered(self, module: nn.Module, name: str, value: Any) -> None:
        """Record a child, parameter or buffer, which no instance dict holds; None may be any."""
        module = original(module)
        self.objects[id(module)] = module
        if name in object.__getattribute__(module, "__dict__")["_modules"]:  # no read to record
            self.children.setdefault((id(module), name), value)
        elif value is None or isinstance(value, torch.Tensor):
            self.tensors[id(module), name] = None

    def asked(self, function: str, file: str, line: int) -> None:
        """Record that a line of the host asks the system something, or prints."""
        if function == "builtins.print":
            self.prints.append(f"{file}:{line}")
        elif function in GENERATORS:
            self.drawn = self.drawn or Drawn(f"{function}() without a seed", (file, line))
        else:
            self.opaque[function] = f"{file}:{line}"

    def named(self, owner: Any, name: str) -> None:
        """Record an attribute of a class or of a module of Python."""
        if name not in OF_PYTHON:
            self.by_name[id(owner), name] = owner

    def whole(self, owner: Any) -> None:
        """Record all names of a class, of a module of Python or of a file."""
        self.spaces[id(owner)] = owner

    def imported(self, name: str) -> None:
        """Record a module of Python."""
        self.imports[name] = None

    def compiled(self, code: CodeType, around: dict[str, Any]) -> None:
        """Record code that was made of a text."""
        self.ran[code] = around

    def lacked(self, owner: Any, name: str) -> None:
        """Record that an object has no such attribute; its class may have an empty slot for it, or
        a property that raises."""
        owner = original(owner)
        if name not in OF_PYTHON:
            self.objects[id(owner)] = owner
            of_class = in_class(type(owner), name, ABSENT) is not ABSENT
            (self.inherited if of_class else self.missing)[id(owner), name] = None

    def stated(self, owner: Any, name: str) -> None:
        """Record an attribute, whether the forward reads it or not."""
        if name in vars(owner):
            self.objects[id(owner)] = owner
            self.values.setdefault((id(owner), name), vars(owner)[name])
        else:
            self.lacked(owner, name)

    def decides(self, buffers: Iterable[tuple[nn.Module, str]]) -> None:
        """Record that Python decides by what buffers hold."""
        for owner, name in buffers:
            owner = original(owner)
            self.objects[id(owner)] = owner
            self.deciding[id(owner), name] = None

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
        named = [getattr(owner, name, None) for (_, name), owner in self.by_name.items()]
        return [in_class(*each, None) for each in classes] + [*self.values.values(), *named]

    def in_spaces(self) -> list[Any]:
        """What `spaces` hold."""
        tables = [vars(s) if isinstance(s, type | ModuleType) else s for s in self.spaces.values()]
        return [value for table in tables for value in table.values()]

    def forget(self, of_trace: Callable[[Any], bool]) -> None:
        """Leave out values that hold something of the trace: the forward had written those."""
        self.values = {key: value for key, value in self.values.items() if not of_trace(value)}

    def forget_made(self, modules: Iterable[nn.Module]) -> None:
        """Leave out what modules hold that the forward itself has made: it makes others next."""
        made = {id(module) for module in modules}
        for kind in ("values", "tensors", "missing", "children", "tables"):
            known = getattr(self, kind).items()
            setattr(self, kind, {key: value for key, value in known if key[0] not in made})

    def _add(self, owner: Any, name: str, value: Any) -> None:
        # in its own forward, which runs in each call: a stand-in reads there
        of_itself = owner is not original(owner)
        owner = original(owner)
        self.objects[id(owner)] = owner
        key, own = (id(owner), name), object.__getattribute__(owner, "__dict__")
        if _is_opaque(value):
            self.opaque[f"{type(owner).__name__}.{name}"] = type(value).__name__
        if id(value) not in self._walked:
            self._walked[id(value)] = value
            for inner in within(value, most=MOST):
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
        elif of_itself and type(owner) is nn.Dropout and name in OF_DROPOUT:
            return
        elif key not in self.values:
            self.values[key] = snapshot(value)

    def _hold(self, value: Any) -> None:
        """Record an object that is not watched by its class, or watch its class."""
        if isinstance(value, MethodType):
            self._hold(value.__self__)
            value = value.__func__
        if isinstance(value, partial):
            self._hold(value.func)
        self._watch_class_of(value if isinstance(value, type) else type(value))
        if may_be_watched(type(value)):
            self._watch(type(value))
        elif id(value) not in self.held and state_of(value) is not ABSENT:
            self.held[id(value)] = value

    def _watch_file(self, file: ModuleType) -> None:
        """Record what the `__getattr__` of a file makes up."""
        made_up: Callable[[str], Any] = vars(file)["__getattr__"]

        def recorded(name: str) -> Any:
            if not self._paused():
                self.named(file, name)
            return made_up(name)

        self._patches.enter_context(mock.patch.dict(vars(file), {"__getattr__": recorded}))

    def _watch_class_of(self, cls: type) -> None:
        """Record what is read of `cls` and of others whose class is one of the host's own."""
        for meta in own_metaclasses(cls)[:1]:
            self._watch(meta)

    def _watch(self, cls: type) -> None:
        """Record the reads of every object of `cls` from now on."""
        if cls in self._patched:
            return
        self._patched.add(cls)
        read: Callable[[Any, str], Any] = getattr(cls, LOOKUP)
        of_class = issubclass(cls, type)

        def recorded(owner: Any, name: str) -> Any:
            if of_class:
                if not self._paused():
                    self.named(owner, name)
                return read(owner, name)
            try:
                value = read(owner, name)
            except AttributeError:
                if not isinstance(owner, nn.Module) and not self._paused():
                    made_up = hasattr(type(owner), "__getattr__") and name not in OF_PYTHON
                    (self.inherits if made_up else self.lacked)(owner, name)
                raise
            if name == "__dict__" and not self._paused() and _asked_by_host(through=WALKS):
                self.objects[id(owner)] = owner
                self.tables[id(owner), name] = list(value)
                for each in value.keys() - OF_TORCH:
                    self._add(owner, each, value[each])
            if name in TABLES and not self._paused() and _asked_by_host(through=WALKS):
                self.objects[id(owner)] = owner
                self.tables[id(owner), name] = list(value)
            if not (name in OF_PYTHON or name in OF_TORCH or self._paused()):
                self._add(owner, name, value)
                return self._handed(value) if isinstance(owner, nn.Module) else value
            return value

        before = vars(cls).get(LOOKUP, ABSENT)
        setattr(cls, LOOKUP, recorded)
        self._patches.callback(_put_back, cls, before)


def _is_opaque(value: Any) -> bool:
    """Whether what an object says cannot be watched: it moves, is large, or answers anything."""
    if disguises(type(value)):
        return True
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


def _put_back(cls: type, before: Any) -> None:
    if before is ABSENT:
        delattr(cls, LOOKUP)
    else:
        setattr(cls, LOOKUP, before)
