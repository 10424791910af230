"""Which attributes of modules, and of what they hold, Python reads while a host is traced."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["ABSENT", "Reads", "may_be_watched", "snapshot"]

ABSENT = object()
"""Stands for an attribute that there is not."""
# What torch itself keeps on a module. Hooks and tensors are watched in ways of their own.
OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_modules"} | {"_compiled_call_impl"}
LOOKUP = "__getattribute__"
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class whose attributes can be set
NOT_WATCHED = (
    *("torch.", "numpy.", "collections", "functools", "logging", "threading", "typing"),
    "tokenprune.tracing.",
)


def snapshot(value: Any) -> Any:
    """A value that later equals `value` as long as nothing in its lists, sets and dicts changes."""
    if type(value) in (list, tuple, set):
        return type(value)(map(snapshot, value)) if value else type(value)()
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    return value


class Reads:
    """The first value of everything that was read, before the host's own code changed it.

    Attributes:
        objects: The modules and other objects, by id.
        values: (id, name) -> a snapshot of the value that the object itself had.
        inherited: (id, name) of what came from an object's class.
        children: (id, name) -> the child module.
        tensors: (id, name) of parameters and buffers, and of tensors that are plain attributes.
    """

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.values: dict[tuple[int, str], Any] = {}
        self.inherited: dict[tuple[int, str], None] = {}
        self.children: dict[tuple[int, str], nn.Module] = {}
        self.tensors: dict[tuple[int, str], None] = {}
        self._patches = ExitStack()
        self._patched: set[type] = set()

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
            yield

    def registered(self, module: nn.Module, name: str, value: Any) -> None:
        """Record a child, parameter or buffer, which no instance dict holds."""
        self.objects[id(module)] = module
        if isinstance(value, nn.Module):
            self.children.setdefault((id(module), name), value)
        elif isinstance(value, torch.Tensor):
            self.tensors[id(module), name] = None

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
        if name not in own:
            module = isinstance(owner, nn.Module)
            of_torch = module and getattr(nn.Module, name, ABSENT) is getattr(type(owner), name, 0)
            if not of_torch and not (module and self._runs_itself(owner)):
                self.inherited[key] = None
        elif isinstance(value, torch.Tensor):
            self.tensors[key] = None
        elif key not in self.values:
            self.values[key] = snapshot(value)
        if may_be_watched(type(value)):
            self._watch(type(value))

    def _watch(self, cls: type) -> None:
        """Record the reads of every object of `cls` from now on."""
        if cls in self._patched:
            return
        self._patched.add(cls)
        read: Callable[[Any, str], Any] = getattr(cls, LOOKUP)

        def recorded(owner: Any, name: str) -> Any:
            value = read(owner, name)
            if not (name.startswith("__") or name in OF_TORCH or self._paused()):
                self._add(owner, name, value)
                return self._handed(value) if isinstance(owner, nn.Module) else value
            return value

        before = vars(cls).get(LOOKUP, ABSENT)
        setattr(cls, LOOKUP, recorded)
        self._patches.callback(_put_back, cls, before)


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
    return has_dict and not cls.__module__.startswith(NOT_WATCHED)
