"""What a host's forward asks the system about: a file, a folder, the clock, the system's random
numbers; and what it prints.

Python's answer is a constant of a program, and no guard can see that it would be another one now.
"""

import builtins
import io
import os
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

from tokenprune.tracing.lookups import unseen_in
from tokenprune.tracing.names import Reached
from tokenprune.tracing.provenance import of_host

__all__ = ["named_by", "outside_noted"]

OPEN = open
THROUGH = ("pathlib", "genericpath")
"""Modules of Python that ask for the line that calls them."""
FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (builtins, "open"),
    (builtins, "print"),
    (io, "open"),
    *((os, name) for name in ("getcwd", "listdir", "urandom", "stat")),
    *((time, name) for name in ("time", "time_ns", "monotonic", "perf_counter", "process_time")),
    *((uuid, name) for name in ("uuid1", "uuid4")),
    *((secrets, name) for name in ("randbelow", "token_bytes", "token_hex", "choice")),
)
NAMES = {id(getattr(owner, name)): f"{owner.__name__}.{name}" for owner, name in FUNCTIONS}
Note = Callable[[str, str, int], None]


@contextmanager
def outside_noted(note: Note) -> Iterator[None]:
    """Call `note` with the name of a function that a line of the host calls, its file and line."""
    with ExitStack() as stack:
        for owner, name in FUNCTIONS:
            noted = _noted(note, f"{owner.__name__}.{name}", getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, noted))
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
    def asked(*args: Any, **kwargs: Any) -> Any:
        caller: FrameType | None = sys._getframe(1)
        while caller is not None and caller.f_globals.get("__name__", "").startswith(THROUGH):
            caller = caller.f_back
        mode = str(args[1] if len(args) > 1 else kwargs.get("mode", "r"))
        writes = original is OPEN and not {"r", "+"} & set(mode)
        if caller is not None and of_host(caller.f_code.co_filename) and not writes:
            note(name, caller.f_code.co_filename, caller.f_lineno)
        return original(*args, **kwargs)

    return asked
