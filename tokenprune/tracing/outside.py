"""What a host's forward asks the system about: a file, a folder, the clock, the system's random
numbers; and what it prints.

Python's answer is a constant of a program, and no guard can see that it would be another one now.
"""

import builtins
import datetime
import io
import os
import random
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np

from tokenprune.tracing.lookups import unseen_in
from tokenprune.tracing.names import Reached
from tokenprune.tracing.provenance import of_host

__all__ = ["GENERATORS", "named_by", "outside_noted"]

OPEN = open
THROUGH = ("pathlib", "genericpath", __name__)
"""Modules that ask for the line that calls them."""
CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (builtins, "open"),
    (builtins, "print"),
    (io, "open"),
    *((os, name) for name in ("getcwd", "listdir", "urandom", "stat")),
    *((time, f"{name}{unit}") for unit in ("", "_ns") for name in CLOCKS),
    *((time, name) for name in ("ctime", "gmtime", "localtime", "strftime")),
    *((uuid, name) for name in ("uuid1", "uuid4")),
    *((secrets, name) for name in ("randbelow", "randbits", "token_bytes", "token_hex", "choice")),
)
MAKERS: tuple[tuple[Any, str], ...] = (
    *((random, name) for name in ("Random", "SystemRandom")),
    *((np.random, name) for name in ("default_rng", "RandomState", "SeedSequence")),
    *((np.random, name) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")),
)
"""What makes generators, of the system's random numbers where no seed is given."""
DATES = (("datetime", ("now", "utcnow", "today")), ("date", ("today",)))
GENERATORS = {f"{owner.__name__}.{name}" for owner, name in MAKERS}
NAMES = {id(getattr(owner, name)): f"{owner.__name__}.{name}" for owner, name in FUNCTIONS}
NAMES |= {id(getattr(o, name)): f"a generator of {o.__name__}.{name}" for o, name in MAKERS}
Note = Callable[[str, str, int], None]


@contextmanager
def outside_noted(note: Note) -> Iterator[None]:
    """Call `note` with the name of a function that a line of the host calls in this thread, its
    file and line."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, make: Callable[..., Any]) -> None:
            noted = make(note, f"{owner.__name__}.{name}", getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, noted))

        for owner, name in FUNCTIONS:
            put(owner, name, _noted)
        for owner, name in MAKERS:
            put(owner, name, _making)
        for name, methods in DATES:
            put(datetime, name, partial(_dated, methods))
        yield


def named_by(reached: Reached, ran: Iterable[Any]) -> Iterator[tuple[str, str, int]]:
    """Such functions that code has a name of its own for (`from time import time`), with the file
    and line of that code; and what code of the packages that `ran` reads and nobody can watch."""
    packages = {_package(function) for function in ran}
    for name, function in reached.too_large():
        if _package(function) in packages:
            code = function.__code__
            yield f"all that {name} holds", code.co_filename, code.co_firstlineno
    for function in reached.functions:
        if _package(function) in packages:
            yield from unseen_in(function)
        code, around = function.__code__, function.__globals__
        for name in (NAMES.get(id(around.get(own)), "") for own in code.co_names):
            if name:
                yield name, code.co_filename, code.co_firstlineno


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _noted(note: Note, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    thread = get_ident()

    def asked(*args: Any, **kwargs: Any) -> Any:
        mode = str(args[1] if len(args) > 1 else kwargs.get("mode", "r"))
        writes = original is OPEN and not {"r", "+"} & set(mode)
        if not writes and get_ident() == thread:
            _tell(note, name)
        return original(*args, **kwargs)

    return asked


def _tell(note: Note, name: str) -> None:
    """Note the line that asks, if it is one of the host."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller.f_globals.get("__name__", "").startswith(THROUGH):
        caller = caller.f_back
    if caller is not None and of_host(caller.f_code.co_filename):
        note(name, caller.f_code.co_filename, caller.f_lineno)


def _making(note: Note, name: str, original: Any) -> Any:
    """A function or class that tells where it makes something without a seed."""
    thread = get_ident()

    def asked(*args: Any, **kwargs: Any) -> Any:
        seeded = any(value is not None for value in (*args, *kwargs.values()))
        if get_ident() == thread and not (seeded and original is not random.SystemRandom):
            _tell(note, name)
        return original(*args, **kwargs)

    return _in_place_of(original, asked, {}) if isinstance(original, type) else asked


def _dated(methods: Iterable[str], note: Note, name: str, original: Any) -> Any:
    """A class of dates whose methods tell where they ask the clock."""
    made = {m: staticmethod(_noted(note, f"{name}.{m}", getattr(original, m))) for m in methods}
    return _in_place_of(original, original, made)


def _in_place_of(original: type, make: Callable[..., Any], own: dict[str, Any]) -> type:
    """A class of which instances of `original` are instances, and which makes such ones."""
    of_class = {
        "__call__": lambda _, *args, **kwargs: make(*args, **kwargs),
        "__instancecheck__": lambda _, value: isinstance(value, original),
        "__subclasscheck__": lambda _, cls: issubclass(cls, original),
    }
    kind: Any = type(type(original).__name__, (type(original),), of_class)
    made: type = kind(original.__name__, (original,), own)
    return made
