"""Theorem 9 where a number is kept by a class, by something in a class, or by what is not equal to
itself."""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.theorems.test_9_holders import odd
from tests.theorems.test_9_places import Place as Held
from tests.theorems.test_9_places import check_it_is_seen, reads_all, wrapped
from tokenprune.errors import TokenPruneWarning


class Number:
    own = 1.0

    @classmethod
    def read(cls) -> float:
        return cls.own


def kind(**attributes: Any) -> Any:
    """A class of its own with a number."""
    return type("Kind", (Number,), {"own": 1.0, "__module__": __name__, **attributes})


class Speaks(type):
    @property
    def number(cls) -> float:
        return cls.kept  # type: ignore[attr-defined,no-any-return]


class Unequal:
    def __init__(self, own: float) -> None:
        self.own = own

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


class Keeps:
    """A descriptor that has the number itself."""

    own = 1.0

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        return self if owner is None else self.own


class Tells:
    """A descriptor that finds the number elsewhere."""

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        return STORE.own


class Makes(OrderedDict[str, Any]):
    """As the table of activations in transformers, which makes one each time."""

    def __getitem__(self, key: str) -> Any:
        return Unequal(super().__getitem__(key))


class OfAll:
    """What a class may hold that gives a number."""

    __slots__ = ("empty",)

    keeps, tells = Keeps(), Tells()
    kind = kind()
    config = SimpleNamespace(own=1.0)

    @property
    def raises(self) -> float:
        if "own" not in GIVEN:
            raise AttributeError("raises")
        return GIVEN["own"]

    @functools.singledispatchmethod
    def by_type(self, number: Any) -> float:
        return 1.0

    def times(self, number: float) -> float:
        return number

    part = functools.partialmethod(times, 1.0)


class OfModule(OfAll, nn.Module):
    pass


class OfObject(OfAll):
    def __init__(self) -> None:
        self.other = 1.0


class Settings:
    inner = kind(inner=kind())
    objects: ClassVar[list[Any]] = [SimpleNamespace(own=1.0)]
    config = SimpleNamespace(own=1.0)


class Global(Number):
    pass


def closed_over(held: Any, read: Callable[[Any], float]) -> Callable[[Any], float]:
    return lambda s: read(held)


def own(thing: Any) -> Callable[[Any, float], Any]:
    return lambda s, v: setattr(thing, "own", v)


def given(s: Any, v: float) -> None:
    GIVEN.clear()
    GIVEN.update({"own": v} if v > 1 else {})


def dispatched(cls: type) -> Callable[[Any, float], Any]:
    return lambda s, v: vars(OfAll)["by_type"].register(cls, lambda self, number: v)


def partly(s: Any, v: float) -> None:
    OfAll.part = functools.partialmethod(OfAll.times, v)


def slotted(s: Any, v: float) -> None:
    if v > 1:
        s.held.empty = v
    else:
        del s.held.empty


STORE, GIVEN, GLOBAL = SimpleNamespace(own=1.0), dict[str, float](), Global()
IN_A_DICT, OF_A_FUNCTION, BY_META = kind(), kind(), Speaks("ByMeta", (), {"kept": 1.0})
OF_A_FILE, MADE = {"a": kind()}, Makes(a=1.0)
READ: Callable[[Any], float] = lambda s: s.own  # noqa: E731

# What the block holds, how its forward reads the number, how it is changed.
CLASSES: dict[str, Held] = {
    "nested_class": (None, lambda s: Settings.inner.own, own(Settings.inner)),
    "nested_twice": (None, lambda s: Settings.inner.inner.own, own(Settings.inner.inner)),
    "nested_class_replaced": (
        None, lambda s: Settings.inner.inner.own,
        lambda s, v: setattr(Settings.inner, "inner", kind(own=v)),
    ),
    "method_of_a_nested_class": (None, lambda s: Settings.inner.read(), own(Settings.inner)),
    "object_in_a_class": (None, lambda s: Settings.config.own, own(Settings.config)),
    "object_in_a_list_of_a_class": (
        None, lambda s: Settings.objects[0].own, own(Settings.objects[0])
    ),
    "class_in_a_dict": ({"a": IN_A_DICT}, lambda s: s.held["a"].own, own(IN_A_DICT)),
    "class_in_a_dict_of_the_file": (
        None, lambda s: OF_A_FILE["a"].own, own(OF_A_FILE["a"])
    ),
    "class_of_an_object_of_the_file": (None, lambda s: GLOBAL.own, own(Global)),
    "class_in_a_closure": (None, closed_over(OF_A_FUNCTION, READ), own(OF_A_FUNCTION)),
    "metaclass_of_a_class_in_a_closure": (
        None, closed_over(BY_META, lambda s: s.number), lambda s, v: setattr(BY_META, "kept", v)
    ),
    "own_name_like_pythons": (
        None, lambda s: getattr(s, "__gain__", 1.0), lambda s, v: setattr(s, "__gain__", v)
    ),
    "nan": (
        math.nan, lambda s: 1.0 if math.isnan(s.held) else 3.0,
        lambda s, v: setattr(s, "held", math.nan if v == 1 else v),
    ),
    "array_for_another": (
        np.ones(3), lambda s: float(s.held[1]), lambda s, v: setattr(s, "held", np.full(3, v))
    ),
    "table_that_makes_what_it_gives": (
        None, lambda s: MADE["a"].own, lambda s, v: MADE.__setitem__("a", v)
    ),
    "never_equal": (
        Unequal(1.0), lambda s: s.held.own, lambda s, v: setattr(s, "held", Unequal(v))
    ),
    **{
        f"{name}_of_{holder.__name__}": (holder(), read, change)
        for holder in (OfModule, OfObject)
        for name, (read, change) in {
            "nested_class": (lambda s: s.held.kind.own, own(OfAll.kind)),
            "method_of_a_nested_class": (lambda s: s.held.kind.read(), own(OfAll.kind)),
            "object_in_the_class": (lambda s: s.held.config.own, own(OfAll.config)),
            "descriptor": (lambda s: s.held.keeps, own(vars(OfAll)["keeps"])),
            "descriptor_that_asks": (lambda s: s.held.tells, own(STORE)),
            "empty_slot": (lambda s: getattr(s.held, "empty", 1.0), slotted),
            "property_that_raises": (lambda s: getattr(s.held, "raises", 1.0), given),
            "partial_method": (lambda s: s.held.part(), partly),
        }.items()
    },
    "method_by_type_of_a_module": (
        OfModule(), lambda s: s.held.by_type(1), dispatched(int)
    ),
    "method_by_type_of_an_object": (
        OfObject(), lambda s: s.held.by_type("a"), dispatched(str)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def reads_all_classes() -> Any:
    return reads_all(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_9_a_number_is_seen_where_a_class_has_it(name: str, reads_all_classes: Any) -> None:
    check_it_is_seen(reads_all_classes, name, CLASSES[name])


def test_9_what_is_another_each_time_is_said() -> None:
    class Makes:
        def __getattr__(self, name: str) -> Any:
            if name == "made":
                return [object()]
            raise AttributeError(name)

    def read(s: Any, x: Tensor) -> float:
        return float(len(s.held.made))

    with pytest.warns(TokenPruneWarning, match=r"cannot watch Makes.made: The forward of Vit"):
        wrapped(odd(read, held=Makes()))
