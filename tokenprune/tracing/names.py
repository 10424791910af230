"""The names that functions look up outside of themselves: what else a trace depends on."""

from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["Namespace", "names_of"]

Namespace = dict[str, Any] | type
NOT_FOLLOWED = ("torch", "numpy", "tokenprune", "builtins", "typing", "functools", "contextlib")


def names_of(functions: Iterable[Any]) -> Iterator[tuple[Namespace, str]]:
    """The names that these functions and those they call may look up, with where: in the globals
    of a file, or in a class.

    Functions of torch and numpy are not looked into. A name that is only read on some other
    branch is among them: more is watched than was read, never less.
    """
    waiting, seen = list(functions), set()
    while waiting:
        function = _plain(waiting.pop())
        if function is None or function in seen or _foreign(function):
            continue
        seen.add(function)
        waiting += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        around, names = function.__globals__, set(_names(function.__code__))
        for name in names & around.keys():
            yield around, name
            value = around[name]
            if isinstance(value, ModuleType):
                inside = vars(value)
                yield from ((inside, inner) for inner in names & inside.keys())
                waiting += [inside[inner] for inner in names & inside.keys()]
            else:
                waiting.append(value)
        for base, name in _overridden(function, names):
            yield base, name
            waiting.append(vars(base)[name])


def _plain(value: Any) -> FunctionType | None:
    value = value.__func__ if isinstance(value, MethodType | staticmethod | classmethod) else value
    value = value.fget if isinstance(value, property) else value
    return value if isinstance(value, FunctionType) else None


def _foreign(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in NOT_FOLLOWED


def _filled(cell: Any) -> bool:
    try:
        return _plain(cell.cell_contents) is not None
    except ValueError:  # a name that the enclosing function has not set yet
        return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _overridden(function: FunctionType, names: set[str]) -> list[tuple[type, str]]:
    """The methods that `super()` may find for a method: reading those is no attribute access."""
    if "super" not in names or "__class__" not in function.__code__.co_freevars:
        return []
    index = function.__code__.co_freevars.index("__class__")
    cls = (function.__closure__ or ())[index].cell_contents
    bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith(NOT_FOLLOWED)]
    return [(base, name) for base in bases for name in names & vars(base).keys()]
