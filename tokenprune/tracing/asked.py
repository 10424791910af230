"""What a host's code reads by a name that it makes: `getattr(type(self), "gain_" + kind)`,
`globals()[name]`, `eval`, `importlib.import_module(name)`.

No name in its code tells of it, and classes and files of Python have no attribute access that could
be seen. But such a look is a call of one of Python's own functions, and those are asked instead.
"""

import builtins
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, ModuleType
from typing import Any, Protocol

from tokenprune.tracing.provenance import of_host, of_python

__all__ = ["GETATTR", "Asked", "Notes", "can_be_imported"]

GETATTR: Any = getattr
"""Python's own: what a node calls must not be what replaces it during a trace."""
EVAL = eval

OF_CLASSES = (type, ModuleType)
"""What keeps its attributes where no access is seen."""
NEW_LOCALS = sys.version_info >= (3, 13)
"""`exec` in a function has a copy of its variables."""


class Notes(Protocol):
    """Takes down what was asked."""

    def named(self, owner: Any, name: str) -> None:
        """An attribute of a class or of a module of Python."""

    def whole(self, owner: Any) -> None:
        """All names of a class, of a module of Python or of a file (its globals)."""

    def imported(self, name: str) -> None:
        """A module of Python."""

    def compiled(self, code: CodeType, around: dict[str, Any]) -> None:
        """Code that was made of a text and ran, with its globals."""


class Asked:
    """Python's own functions, replaced by ones that tell `notes` what lines of the host ask them
    for, unless `paused`."""

    def __init__(self, notes: Notes, paused: Callable[[], bool]) -> None:
        patches = [
            *((builtins, name, _attribute) for name in ("getattr", "hasattr")),
            (builtins, "vars", _names),
            (builtins, "globals", _file),
            *((builtins, name, _text) for name in ("eval", "exec")),
            (builtins, "__import__", _statement),
            (importlib, "import_module", _import),
        ]
        self._before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
        made = [
            wrapper(original, notes, lambda: not paused() and _host_asks())
            for (_, _, wrapper), (_, _, original) in zip(patches, self._before, strict=True)
        ]
        self._made = [(*of[:2], new) for of, new in zip(self._before, made, strict=True)]
        self._on = False

    @contextmanager
    def noted(self, on: bool = True) -> Iterator[None]:
        """Inside they are replaced, or not: torch asks tens of thousands of times in a trace."""
        was = self._on
        self._set(on)
        try:
            yield
        finally:
            self._set(was)

    def _set(self, on: bool) -> None:
        if on is not self._on:
            self._on = on
            for owner, name, function in self._made if on else self._before:
                setattr(owner, name, function)


def can_be_imported(name: str) -> bool:
    """Whether Python would find a module, of a name with dots its package at least."""
    if name in sys.modules:
        return sys.modules[name] is not None
    package = name.rpartition(".")[0]
    if package and package not in sys.modules:
        return can_be_imported(package)
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


Asks = Callable[[], bool]


def _host_asks() -> bool:
    """Whether a line of the host asks, by a function of Python's library (`inspect`) too; what runs
    once, while a file is imported, is nothing that a call asks again."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and of_python(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or frame.f_code.co_name == "<module>":
        return False
    file = frame.f_code.co_filename
    return of_host(file) or file == "<string>"


def _attribute(original: Callable[..., Any], notes: Notes, asks: Asks) -> Callable[..., Any]:
    def of_builtins(*args: Any) -> Any:
        if len(args) > 1 and issubclass(type(args[0]), OF_CLASSES) and asks():
            notes.named(args[0], args[1])
        return original(*args)

    return of_builtins


def _names(original: Callable[..., Any], notes: Notes, asks: Asks) -> Callable[..., Any]:
    def of_builtins(*args: Any) -> Any:
        if not args:
            return sys._getframe(1).f_locals
        if issubclass(type(args[0]), OF_CLASSES) and asks():
            notes.whole(args[0])
        return original(*args)

    return of_builtins


def _file(_original: Callable[..., Any], notes: Notes, asks: Asks) -> Callable[..., Any]:
    def of_builtins() -> Any:
        around = sys._getframe(1).f_globals
        if asks():
            notes.whole(around)
        return around

    return of_builtins


def _text(original: Callable[..., Any], notes: Notes, asks: Asks) -> Callable[..., Any]:
    def of_builtins(
        source: Any,
        globals: dict[str, Any] | None = None,
        locals: Any = None,
        /,
        **options: Any,
    ) -> Any:
        frame, whose = sys._getframe(1), globals
        around = frame.f_globals if whose is None else whose
        if locals is None:
            inside = around if whose is not None else frame.f_locals
            locals = dict(inside) if NEW_LOCALS and inside is not around else inside
        if asks():
            if isinstance(source, str | bytes):
                text = source.lstrip() if original is EVAL else source
                source = compile(text, "<string>", original.__name__, dont_inherit=True)
            if isinstance(source, CodeType):
                notes.compiled(source, around)
        return original(source, around, locals, **options)

    return of_builtins


def _statement(original: Callable[..., Any], notes: Notes, asks: Asks) -> Callable[..., Any]:
    def of_builtins(
        name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        caller = sys._getframe(1).f_code
        own = caller.co_name != "<module>" and not of_python(caller.co_filename)
        if not (own and asks()):
            return original(name, globals, locals, fromlist, level)
        whole = name
        if level:
            package = (globals or {}).get("__package__") or ""
            whole = importlib.util.resolve_name("." * level + name, package)
        notes.imported(whole)
        found = original(name, globals, locals, fromlist, level)
        for each in fromlist or ():
            if each != "*":
                notes.named(sys.modules.get(whole, found), each)
        return found

    return of_builtins


def _import(original: Callable[..., Any], notes: Notes, asks: Asks) -> Callable[..., Any]:
    def of_builtins(name: str, package: str | None = None) -> Any:
        if asks():
            whole = importlib.util.resolve_name(name, package) if name[:1] == "." else name
            notes.imported(whole)
        return original(name, package)

    return of_builtins
