"""Theorem 9 where no name in the code tells what it reads: it makes the name, or another class or
file answers; and where what is asked for is not there yet."""

import abc
import gc
import importlib
import inspect
import operator
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from tests.theorems.test_9_holders import odd
from tests.theorems.test_9_places import IMAGES, Plain, host_that_reads
from tests.theorems.test_9_places import Place as Held
from tokenprune.errors import TokenPruneWarning
from tokenprune.tracing.host_graph import trace


class Number:
    own = 1.0


class Whole:
    own = 1.0


class ByWord:
    own = 1.0


class Lacks:
    pass


class Answers(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("made"):
            return ANSWER["own"]
        raise AttributeError(name)

    def __getitem__(cls, name: str) -> float:
        return ANSWER[name]

    def read(cls) -> float:
        return ANSWER["own"]


class OfAnswers(metaclass=Answers):
    pass


class Kind(abc.ABC):  # noqa: B024  what is registered with it is the case
    pass


class Parent:
    pass


def file_of_a_test(name: str, **names: Any) -> Any:
    made = ModuleType(name)
    vars(made).update(names)
    sys.modules[name] = made
    return made


def answer(name: str) -> Any:
    if name == "made":
        return ANSWER["own"]
    raise AttributeError(name)


OF_FILE = """
def by_name(s): return globals()["NUMBER_" + s.held]
def lacking(s): return globals().get("NUMBER_" + s.held, 1.0)
def by_text(s): return eval(s.held + "_A")
def by_statements(s):
    exec("found = NUMBER_A * 1", globals(), found := {})
    return found["found"]
"""
ANSWER, MANY = {"own": 1.0}, 500
READS = file_of_a_test("made_reads", NUMBER_A=1.0)
exec(compile(OF_FILE, "made_reads.py", "exec"), vars(READS))
FILE = file_of_a_test("made_file", own=1.0)
OTHER = file_of_a_test("made_other", own=1.0)
LATER = file_of_a_test("made_later")
SPEAKS = file_of_a_test("made_speaks", __getattr__=answer)
TOO_MANY = [Plain() for _ in range(3000)]
FOLDER = TemporaryDirectory()
OBJECTS = {number: Plain() for number in range(MANY)}
SPACES = [SimpleNamespace(own=1.0) for _ in range(MANY)]
FUNCTIONS = {number: partial(dict.get, {"own": 1.0}, "own") for number in range(MANY)}
FUNCTIONS[MANY - 1] = lambda: ANSWER["own"]  # type: ignore[assignment]
DEEP = Plain()
for _ in range(12):
    DEEP = SimpleNamespace(inner=DEEP)  # type: ignore[assignment]


def deepest() -> Any:
    inner: Any = DEEP
    while hasattr(inner, "inner"):
        inner = inner.inner
    return inner


def by_statement(s: Any) -> float:
    try:
        import made_missing  # type: ignore[import-not-found]
    except ImportError:
        return 1.0
    return made_missing.own  # type: ignore[no-any-return]


def by_path(s: Any) -> float:
    try:
        return importlib.import_module("made_on_" + "disk").own  # type: ignore[no-any-return]
    except ImportError:
        return 1.0


def on_disk(s: Any, v: float) -> None:
    importlib.invalidate_caches()
    sys.modules.pop("made_on_disk", None)
    if v > 1:
        (Path(FOLDER.name) / "made_on_disk.py").write_text(f"own = {v}", encoding="utf-8")
        sys.path.insert(0, FOLDER.name)
    else:
        sys.path.pop(0)


def absent_global(s: Any) -> float:
    try:
        return MADE_LATER  # type: ignore[name-defined,no-any-return]
    except NameError:
        return 1.0


def absent(read: Callable[[], Any]) -> Callable[[Any], float]:
    def found(s: Any) -> float:
        try:
            return read()  # type: ignore[no-any-return]
        except AttributeError:
            return 1.0

    return found


def own(thing: Any, name: str = "own") -> Callable[[Any, float], Any]:
    def change(s: Any, v: float) -> None:
        if v == 1 and not MISSING[id(thing)] & {name}:
            setattr(thing, name, v)
        elif v == 1:
            delattr(thing, name)
        else:
            setattr(thing, name, v)

    MISSING.setdefault(id(thing), set()).update(set() if hasattr(thing, name) else {name})
    return change


MISSING: dict[int, set[str]] = {}


def of_this_file(s: Any, v: float) -> None:
    globals().update(MADE_LATER=v) if v > 1 else globals().pop("MADE_LATER")


def answered(s: Any, v: float) -> None:
    ANSWER["own"] = v


def in_modules(s: Any, v: float) -> None:
    if v > 1:
        file_of_a_test("made_missing", own=v)
    else:
        del sys.modules["made_missing"]


def derived(s: Any, v: float) -> None:
    CHILDREN[:] = [type("Child", (Parent,), {})] if v > 1 else []
    gc.collect()


CHILDREN: list[type] = []


# What the block holds, how its forward reads the number, how it is changed.
MADE: dict[str, Held] = {
    "attribute_of_a_class": ("ow", lambda s: getattr(Number, s.held + "n"), own(Number)),
    "attribute_of_the_own_class": (
        "sca", lambda s: getattr(type(s), s.held + "le"),
        lambda s, v: setattr(type(s), "scale", v),
    ),
    "attribute_of_a_file": ("ow", lambda s: getattr(FILE, s.held + "n"), own(FILE)),
    "attribute_that_a_class_lacks": (
        "gai", lambda s: 3.0 if hasattr(Number, s.held + "n") else 1.0, own(Number, "gain")
    ),
    "name_of_its_file": ("A", READS.by_name, own(READS, "NUMBER_A")),
    "name_that_its_file_lacks": ("B", READS.lacking, own(READS, "NUMBER_B")),
    "text": ("NUMBER", READS.by_text, own(READS, "NUMBER_A")),
    "statements_of_a_text": (None, READS.by_statements, own(READS, "NUMBER_A")),
    "text_of_its_variables": (
        "s.scale * 1", lambda s: eval(s.held),
        lambda s, v: setattr(type(s), "scale", v),
    ),
    "table_of_a_class": ("ow", lambda s: vars(Whole)[s.held + "n"], own(Whole)),
    "dict_of_its_class": (
        "sca", lambda s: type(s).__dict__[s.held + "le"],
        lambda s, v: setattr(type(s), "scale", v),
    ),
    "dict_of_a_class_by_word": ("ow", lambda s: ByWord.__dict__[s.held + "n"], own(ByWord)),
    "dict_of_a_file": ("ow", lambda s: OTHER.__dict__[s.held + "n"], own(OTHER)),
    "module_by_a_name_that_is_made": (
        "made_", lambda s: importlib.import_module(s.held + "other").own, own(OTHER)
    ),
    "import_that_fails": (None, by_statement, in_modules),
    "import_that_finds_no_file": (None, by_path, on_disk),
    "global_that_is_not_there": (None, absent_global, of_this_file),
    "attribute_that_a_file_lacks": (None, absent(lambda: LATER.own), own(LATER)),
    "attribute_that_a_class_by_name_lacks": (None, absent(lambda: Lacks.own), own(Lacks)),  # type: ignore[attr-defined]
    "answer_of_a_file": (None, lambda s: SPEAKS.made, answered),
    "answer_of_a_metaclass": (None, lambda s: OfAnswers.made, answered),  # type: ignore[attr-defined]
    "answer_of_the_metaclass_of_what_is_held": (OfAnswers, lambda s: s.held.made_up, answered),
    "item_of_a_class": (None, lambda s: OfAnswers["own"], answered),
    "method_of_a_metaclass": (OfAnswers(), lambda s: type(s.held).read(), answered),  # type: ignore[attr-defined]
    "object_of_a_long_table": (MANY - 1, lambda s: OBJECTS[s.held].own, own(OBJECTS[MANY - 1])),
    "namespace_of_a_long_table": (MANY - 1, lambda s: SPACES[s.held].own, own(SPACES[MANY - 1])),
    "function_of_a_long_table": (MANY - 1, lambda s: FUNCTIONS[s.held](), answered),  # type: ignore[dict-item,return-value]
    "object_twelve_deep": (None, lambda s: deepest().own, own(deepest())),
    "subclasses": (None, lambda s: 1.0 + len(Parent.__subclasses__()), derived),
    "name_of_pythons_that_its_file_hides": (
        None, lambda s: float(ascii(1) != "'1'") + float(ascii(1) == "2"),
        lambda s, v: globals().pop("ascii") if v == 1 else globals().update(ascii=lambda n: "2"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def traced() -> tuple[Any, Any]:
    """A host whose last block reads a number in each of these places, and its guards."""
    host = host_that_reads(MADE)
    return host, trace(host, {"x": IMAGES}).guards


@pytest.mark.parametrize("name", MADE)
def test_9_a_number_is_seen_whoever_makes_its_name(name: str, traced: Any) -> None:
    host, guards = traced
    (_, read, change), one = MADE[name], host.get_submodule(f"blocks.2.readers.{name}")
    assert (read(one), guards.changed()) == (1.0, None)
    try:
        change(one, 3.0)
        assert read(one) != 1.0
        assert not guards.hold()
        assert guards.changed() is not None
    finally:
        change(one, 1.0)
    assert guards.hold()


def test_9_a_class_that_is_declared_to_be_another_is_seen() -> None:
    host: Any = odd(lambda s, x: 3.0 if isinstance(s, Kind) else 1.0)
    guards = trace(host, {"x": IMAGES}).guards
    assert guards.hold()
    Kind.register(type(host.blocks[2]))
    assert not guards.hold()


def by_modules(s: Any, x: Tensor) -> float:
    return sys.modules["made_" + s.held].own  # type: ignore[no-any-return]


def by_getter(s: Any, x: Tensor) -> float:
    return operator.attrgetter("o" + s.held)(Number)  # type: ignore[no-any-return]


def by_static(s: Any, x: Tensor) -> float:
    return inspect.getattr_static(Number, "o" + s.held)  # type: ignore[no-any-return]


def of_too_many(s: Any, x: Tensor) -> float:
    return TOO_MANY[s.held].own


UNSEEN: dict[str, tuple[Callable[[Any, Tensor], float], Any, str]] = {
    "modules": (by_modules, "file", r"sys.modules: .*test_9_made.py:\d+"),
    "getter": (by_getter, "wn", r"operator.attrgetter: .*test_9_made.py:\d+"),
    "static": (by_static, "wn", r"inspect.getattr_static: .*test_9_made.py:\d+"),
    "too_many": (of_too_many, -1, r"all that TOO_MANY holds: .*test_9_made.py:\d+"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_9_a_look_that_nobody_sees_is_said(name: str) -> None:
    read, held, said = UNSEEN[name]
    with pytest.warns(TokenPruneWarning, match=f"cannot watch {said}"):
        trace(odd(read, held=held), {"x": IMAGES})
