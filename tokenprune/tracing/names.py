"""The names that functions look up outside of themselves: what else a trace depends on."""

import dis
import sys
from collections.abc import Iterable, Iterator, Set
from enum import Enum
from functools import cached_property, lru_cache, partialmethod, singledispatchmethod
from itertools import chain
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch.nn import Module

from tokenprune.tracing.contents import ABSENT, MOST, can_be_set, flat, in_class, within
from tokenprune.tracing.lookups import absent_in
from tokenprune.tracing.provenance import of_python

__all__ = [
    "CALLED",
    "Name",
    "Namespace",
    "Reached",
    "as_function",
    "compared_types",
    "data_of",
    "is_foreign",
    "is_own_class",
    "is_own_place",
    "own_metaclasses",
    "reached_by",
    "value_of",
]

Namespace = dict[str, Any] | type
Name = tuple[Namespace, str]
CALLED = (FunctionType, staticmethod, classmethod)
CACHED = type(lru_cache(len))
HOLDS_ONE = (cached_property, partialmethod, singledispatchmethod)
TABLES = (dict, list, tuple, set, frozenset)
DATA = (bool, int, float, str, type(None), list, tuple, dict, set)
COMPARES = ("COMPARE_OP", "IS_OP")
TENSORS = {"Tensor", "Parameter"}
NOT_FOLLOWED = (
    "torch",
    "numpy",
    "tokenprune",
    "builtins",
    "typing",
    "functools",
    "contextlib",
    "sys",
)


class Reached:
    """Functions and those that they may call, each with the names that it may look up, and where:
    in the globals of a file, or in a class that something of it all is or holds an object of.

    Functions of torch and numpy are not looked into. A name that is only read on some other
    branch is among them: more is watched than was read, never less.

    Attributes:
        absent: The names that are not there, each with where it is looked up.
        classes: What something of it all is or is an object of, and the classes of those.
    """

    def __init__(self, functions: Iterable[Any]) -> None:
        self._given = waiting = list(functions)
        self._names: dict[FunctionType, list[Name]] = {}
        self._members: dict[type, set[str]] = {}
        self._of_classes: dict[tuple[int, str], Name] = {}
        self._absent: dict[tuple[int, str], tuple[Any, str]] = {}
        while waiting:
            for value in waiting:
                self._note_classes(value)
            waiting = self._follow(waiting) or self._named_in_classes()

    def _follow(self, values: list[Any]) -> list[Any]:
        """Take in functions; what they look up."""
        found = list[Any]()
        for function in filter(None, map(_plain, values)):
            if function in self._names or is_foreign(function):
                continue
            self._names[function] = names = list(_looked_up(function))
            found += _enclosed(function)
            for place, name in names:
                value = value_of(place, name)
                found.append(value)
                if issubclass(type(value), dict) and len(value) <= MOST:
                    found += value.values()
            for place, name in absent_in(function):
                self._absent[id(place), name] = place, name
                found.append(getattr(place, "__dict__", {}).get("__getattr__"))  # of a file
        return found

    def _note_classes(self, value: Any) -> None:
        for cls in (v if isinstance(v, type) else type(v) for v in within(value)):
            for each in (cls, *own_metaclasses(cls)):
                if each not in self._members:
                    self._members[each] = _members_of(each)

    def _named_in_classes(self) -> list[Any]:
        """What code may read of classes (`Config.scale`) and was not taken in yet."""
        words, found = self.words(), list[Any]()
        for cls, members in self._members.items():
            # Python calls those of a metaclass where no name tells of it: `Registry["a"]`
            for name in members if issubclass(cls, type) else words & members:
                if (id(cls), name) not in self._of_classes:
                    self._of_classes[id(cls), name] = cls, name
                    found.append(value_of(cls, name))
        return found

    @property
    def absent(self) -> list[tuple[Any, str]]:
        return list(self._absent.values())

    @property
    def classes(self) -> list[type]:
        return list(self._members)

    @property
    def functions(self) -> list[FunctionType]:
        """Each once."""
        return list(self._names)

    @property
    def names(self) -> list[Name]:
        """All names, with where."""
        return [*chain.from_iterable(self._names.values()), *self._of_classes.values()]

    def values(self) -> list[Any]:
        """What the names stand for."""
        return [value_of(place, name) for place, name in self.names]

    def tables(self) -> list[Any]:
        """What names of files of the host's own stand for, or of its classes."""
        return [value_of(place, name) for place, name in self.names if is_own_place(place)]

    def too_large(self) -> Iterator[tuple[str, FunctionType]]:
        """The names of tables that hold more objects than are watched, and who reads them."""
        for function, names in self._names.items():
            for place, name in filter(lambda each: is_own_place(each[0]), names):
                value = value_of(place, name)
                if issubclass(type(value), TABLES) and len(list(flat(value))) > MOST:
                    yield name, function

    def caches(self) -> list[Any]:
        """Those with an `lru_cache` among the functions and all that they may call."""
        found = [*self._given, *(e for function in self._names for e in _enclosed(function))]
        return [value for value in found + self.values() if isinstance(value, CACHED)]

    def codes(self) -> list[CodeType]:
        """The code of the functions, and of those inside of them."""
        return [code for function in self._names for code in _codes(function.__code__)]

    def words(self) -> set[str]:
        """The names in their code."""
        return set[str]().union(*[_names_in(place.__code__) for place in self._names])


def reached_by(root: Module, forward: Any) -> Reached:
    """What a call of `forward` of a host may reach, before it has run; functions that its modules
    hold are among it."""
    classes, held = dict[type, None](), list[Any]()
    for module in root.modules():
        classes[type(module)] = None
        held += [value for value in vars(module).values() if _plain(value)]
    return Reached([forward, *held, *(in_class(c, "forward", None) for c in classes), *classes])


def as_function(code: CodeType, around: dict[str, Any]) -> FunctionType:
    """A function of some code that ran, without what its closure held."""
    return FunctionType(code, around, closure=tuple(CellType() for _ in code.co_freevars))


def compared_types(codes: Iterable[CodeType]) -> list[str]:
    """Lines that compare `type(x)` with a class of tensors, of which the tensors of a trace seem to
    be (`isinstance`) and are not."""
    asking = [c for c in codes if "type" in c.co_names and TENSORS & set(c.co_names)]
    lines = list[str]()
    for code in asking:
        steps, line = list(dis.get_instructions(code)), code.co_firstlineno
        for at, step in enumerate(steps):
            line = (step.positions.lineno if step.positions else None) or line
            before = [each.argval for each in steps[max(at - 8, 0) : at]]
            if step.opname in COMPARES and before and before[-1] in TENSORS:
                lines += [f"{code.co_filename}:{line}"] if "type" in before else []
    return lines


def value_of(place: Namespace, name: str) -> Any:
    """What a name of `Reached` stands for."""
    if isinstance(place, dict):
        return place[name]
    kept = in_class(place, name, ABSENT)
    return getattr(place, name, None) if kept is ABSENT else kept


def _looked_up(function: FunctionType) -> Iterator[tuple[Namespace, str]]:
    names = _names_in(function.__code__)
    waiting, seen = [function.__globals__], list[Any]()
    modules = [sys.modules[n] for n in names & sys.modules.keys() if n not in NOT_FOLLOWED]
    waiting += [vars(module) for module in modules if isinstance(module, ModuleType)]  # `import`
    while waiting:  # `torch.nn.functional.softmax` is a name in each of three modules
        inside = waiting.pop()
        seen.append(inside)
        for name in names & inside.keys():
            yield inside, name
            value = inside[name]
            if value is sys:  # its tables change with any import
                continue
            if isinstance(value, ModuleType) and not any(vars(value) is s for s in seen):
                waiting.append(vars(value))
    yield from _overridden(function, names)


@lru_cache(maxsize=10_000)
def _names_in(code: CodeType) -> frozenset[str]:
    """The names in it, and words that may be some: `getattr(config, "scale")`."""
    codes = list(_codes(code))
    words = (c for code in codes for c in code.co_consts if isinstance(c, str))
    names = (name for code in codes for name in code.co_names)
    return frozenset([*names, *(word for word in words if word.isidentifier())])


def data_of(cls: Any) -> set[str]:
    """The data among the attributes of a class; nothing if it is none."""
    names = _members_of(cls) if isinstance(cls, type) else set[str]()
    return {name for name in names if isinstance(value_of(cls, name), DATA)}


def _members_of(cls: type) -> set[str]:
    """The attributes of a class of the host's own: members of an Enum and properties of its
    metaclass too."""
    if issubclass(cls, type):
        own = is_own_class(cls)
        return {name for name, value in vars(cls).items() if own and _plain(value)}
    names = {name for base in cls.__mro__ if _is_own(base) for name in dict(vars(base))}
    names |= set(cls._member_names_) if issubclass(cls, Enum) else set()
    metas = (item for meta in own_metaclasses(cls) for item in vars(meta).items())
    names |= {name for name, value in metas if isinstance(value, property)}
    return {name for name in names if name[:2] != "__"}


def own_metaclasses(cls: type) -> list[type]:
    """The classes of a class that are the host's own, neither Python's nor torch's."""
    if type(cls) is type:
        return []
    return [m for m in type.mro(type(cls)) if can_be_set(m) and is_own_class(m)]


def is_own_place(place: Namespace) -> bool:
    """Whether a class or the globals of a file are neither Python's nor torch's."""
    if isinstance(place, type):
        return is_own_class(place)
    file = str(place.get("__name__")).partition(".")[0]
    return file not in NOT_FOLLOWED and file not in sys.stdlib_module_names


def is_own_class(cls: type) -> bool:
    """Whether a class is neither of Python's library nor of torch, NumPy or ours."""
    return _is_own(cls) and str(cls.__module__).partition(".")[0] not in sys.stdlib_module_names


def _is_own(cls: type) -> bool:
    return str(cls.__module__).partition(".")[0] not in NOT_FOLLOWED


def _plain(value: Any) -> FunctionType | None:
    value = value.__func__ if isinstance(value, MethodType | staticmethod | classmethod) else value
    value = value.fget if isinstance(value, property) else value
    value = value.func if isinstance(value, HOLDS_ONE) else value
    value = value.__wrapped__ if isinstance(value, CACHED) else value
    return value if isinstance(value, FunctionType) else None


def is_foreign(function: FunctionType) -> bool:
    """Whether it is Python's, NumPy's, torch's or ours; `os` asks its environment."""
    file = function.__code__.co_filename
    if (function.__module__ or "").partition(".")[0] in NOT_FOLLOWED or file[:7] == "<frozen":
        return True
    return of_python(file) and function.__module__ != "os"


def _enclosed(function: FunctionType) -> list[Any]:
    """What is in a closure; a name may be there that the enclosing function has not set yet."""
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if cell != CellType()]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _overridden(function: FunctionType, names: Set[str]) -> list[tuple[type, str]]:
    """The methods that `super()` may find for a method: reading those is no attribute access."""
    if "super" not in names or "__class__" not in function.__code__.co_freevars:
        return []
    index = function.__code__.co_freevars.index("__class__")
    cell = (function.__closure__ or ())[index]
    cls = cell.cell_contents if cell != CellType() else object
    bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith(NOT_FOLLOWED)]
    return [(base, name) for base in bases for name in names & vars(base).keys()]
