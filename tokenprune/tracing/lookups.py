"""Names that code looks up outside of itself and does not find; they may be there later.

`try: SCALE except NameError: ...`, `hasattr` by hand (`try: config.scale except AttributeError`),
and what the `__getattr__` of a class's class or of a file makes up.
"""

import inspect
import operator
import sys
from collections.abc import Iterator
from dis import get_instructions
from functools import lru_cache
from itertools import pairwise
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from tokenprune.tracing.contents import ABSENT, in_class

__all__ = ["absent_in", "reads_classes_whole", "unseen_in"]

BEGIN = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
GO_ON = ("LOAD_ATTR", "LOAD_METHOD")
UNSEEN = {
    operator.attrgetter: "operator.attrgetter",
    operator.methodcaller: "operator.methodcaller",
    inspect.getattr_static: "inspect.getattr_static",
}
"""What looks into classes and files of Python without a call that could be noted."""
BETWEEN = ("CACHE", "NOP", "EXTENDED_ARG", "PUSH_NULL", "RESUME")


class Chain(NamedTuple):
    """`a.b.c` in some code.

    Attributes:
        closed: Whether the first name is of the function around it.
        names: At least one.
        line: Where it stands.
        constant: Whether a word that the code holds follows it, or it is asked for one.
    """

    closed: bool
    names: tuple[str, ...]
    line: int
    constant: bool


@lru_cache(maxsize=1 << 14)
def _chains(code: CodeType) -> tuple[Chain, ...]:
    found = list[Chain]()
    steps = [step for step in get_instructions(code) if step.opname not in BETWEEN]
    line = code.co_firstlineno
    for at, step in enumerate(steps):
        line = (step.positions.lineno if step.positions else None) or line
        if step.opname not in BEGIN:
            continue
        names, end = [step.argval], at + 1
        while end < len(steps) and steps[end].opname in GO_ON:
            names.append(steps[end].argval)
            end += 1
        word, after, *_ = [s.opname for s in steps[end : end + 2]] + ["", ""]
        whole = after == "LOAD_CONST" or not after.startswith("LOAD")
        constant = (word == "LOAD_CONST" and whole) or word == "CONTAINS_OP"
        found.append(Chain("DEREF" in step.opname, tuple(names), line, constant))
    return tuple(dict.fromkeys(found))


def absent_in(function: FunctionType) -> Iterator[tuple[Any, str]]:
    """The names that a function looks up and that are not there, each with where it is looked up:
    the globals of its file, a module of Python, a class. Names of Python's own that it uses count:
    a file may get one that hides them. `__dict__` stands for all names that are there."""
    around = function.__globals__
    for code, cells in _codes(function):
        for chain in _chains(code):
            value: Any = cells.get(chain.names[0], ABSENT) if chain.closed else ABSENT
            if not chain.closed:
                value = around.get(chain.names[0], ABSENT)
                if value is ABSENT:
                    yield around, chain.names[0]
            for name in chain.names[1:]:
                if not issubclass(type(value), (ModuleType, type)):
                    break
                if name == "__dict__":
                    yield value, name
                    break
                module = issubclass(type(value), ModuleType)
                held = vars(value).get(name, ABSENT) if module else in_class(value, name, ABSENT)
                if held is ABSENT:
                    yield value, name
                value = held


@lru_cache(maxsize=1 << 14)
def reads_classes_whole(code: CodeType) -> bool:
    """Whether some code reads `type(x).__dict__`, `x.__class__.__dict__` or `cls.__dict__`."""
    if "__dict__" not in code.co_names:
        return False
    steps = [step for step in get_instructions(code) if step.opname not in BETWEEN]
    for before, step in pairwise(steps):
        of_class = before.opname == "CALL" or before.argval in ("__class__", "cls")
        if of_class and step.opname in GO_ON and step.argval == "__dict__":
            return True
    return False


def unseen_in(function: FunctionType) -> Iterator[tuple[str, str, int]]:
    """What a function uses to look something up that nobody sees: its name, the file, the line."""
    for code, cells in _codes(function):
        for chain in _chains(code):
            value = (cells if chain.closed else function.__globals__).get(chain.names[0], ABSENT)
            for name in chain.names[1:]:
                if not isinstance(value, ModuleType):
                    break
                value = vars(value).get(name, ABSENT)
            found = [name for what, name in UNSEEN.items() if value is what or type(value) is what]
            if value is sys.modules and not chain.constant:
                found.append("sys.modules")
            yield from ((name, code.co_filename, chain.line) for name in found)


def _codes(function: FunctionType) -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """The code of a function and of those inside of it, with what their closures hold."""
    names = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    cells = {name: cell.cell_contents for name, cell in names if cell != CellType()}
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield code, cells
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
