"""What is watched of all that Python read while a host was traced, and how it is looked up."""

import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tokenprune.tracing import looks
from tokenprune.tracing.contents import (
    ABSENT,
    beyond,
    container_of,
    equal,
    in_class,
    kinds_of,
    may_be_watched,
    snapshot,
    state_of,
    within,
)
from tokenprune.tracing.hooks import Hooks
from tokenprune.tracing.idle import may_be_idle
from tokenprune.tracing.lookups import reads_classes_whole
from tokenprune.tracing.names import (
    CALLED,
    Reached,
    data_of,
    is_foreign,
    is_own_class,
    is_own_place,
)
from tokenprune.tracing.reads import Reads
from tokenprune.tracing.settings import setting, settings_named_by

__all__ = ["DIFFERS", "HOOKS", "HOOKS_OF", "WHOLE", "Watched", "all_watched", "hooks_watched"]

BY_TYPE = {
    *("__call__", "__getattr__", "__getitem__", "__iter__", "__contains__", "__len__"),
    *("__bool__", "__int__", "__float__", "__index__", "__eq__", "__missing__"),
}
"""Methods that Python finds by the class alone."""
LOOKUP = "__getattribute__"
WHOLE = ("__dict__", "_modules", "_parameters", "_buffers")
"""Tables that are watched in place: a module may get others, by `__setstate__` say."""
DIFFERS = (RuntimeError, ValueError, TypeError, AttributeError)
"""What a comparison of tensors or arrays raises, and the look at something that is gone."""


class Watched(NamedTuple):
    """One value that Python read.

    Attributes:
        owner: Whose it is.
        look: Called with `table`, `name` and a value for "absent"; gives what is there now.
        expected: What was there.
    """

    owner: Any
    look: Callable[[Any, str, Any], Any]
    table: Any
    name: str
    expected: Any

    def same(self) -> bool:
        """Whether it is as it was."""
        try:
            now = self.look(self.table, self.name, ABSENT)
            alike = container_of(type(now)) is container_of(type(self.expected))
            if not (alike and equal(now, self.expected)):
                return False
            return not self.stored or kinds_of(now) == kinds_of(self.expected)
        except DIFFERS:
            return False

    def steady(self) -> bool:
        """Whether who looks twice sees the same."""
        try:
            looks = [self.look(self.table, self.name, ABSENT) for _ in range(2)]
            return equal(*map(snapshot, looks))
        except DIFFERS:
            return True

    @property
    def stored(self) -> bool:
        """Whether what is looked up is kept there: a property may make its value anew each time."""
        if self.look is getattr:
            return isinstance(self.table, type | FunctionType | ModuleType)
        return self.look in (dict.get, in_class, looks.state_now, looks.itself)

    def wrapped_by_fx(self) -> bool:
        """Whether it is what `torch.fx.wrap` puts in a function's place while something traces."""
        now = self.look(self.table, self.name, ABSENT)
        return isinstance(now, FunctionType) and getattr(now, "__wrapped__", None) is self.expected


def all_watched(reads: Reads, functions: Iterable[Any]) -> Iterator[Watched]:
    """All that was read; and, where it holds tensors that modules hold too, that they do."""
    tied: dict[int, Tensor] = {}
    for watched in _read(reads, functions):
        yield watched
        for inner in () if watched.name in WHOLE else within(watched.expected):
            if id(inner) in reads.places:
                tied[id(inner)] = inner
    for tensor_id, tensor in tied.items():
        for owner, name in reads.places[tensor_id]:
            yield Watched(owner, looks.holds, (owner, tensor), name, True)


def _read(reads: Reads, functions: Iterable[Any]) -> Iterator[Watched]:
    owners = list(reads.objects.values())
    for key, value in reads.values.items():
        owner, name = reads.objects[key[0]], key[1]
        if name == "_modules":
            yield Watched(owner, looks.items, owner._modules, name, list(value.items()))
        else:
            yield Watched(owner, dict.get, vars(owner), name, value)
    for key in reads.inherited:
        owner, name = reads.objects[key[0]], key[1]
        yield Watched(owner, dict.get, vars(owner), name, ABSENT)  # an own one would hide it
        kept = in_class(type(owner), name, ABSENT)
        if kept is not ABSENT:
            yield from _of_class(type(owner), name)
        if kept is ABSENT or _computes(kept):  # made up by `__getattr__`, or by a descriptor
            yield Watched(owner, getattr, owner, name, snapshot(getattr(owner, name, ABSENT)))
    for leaf in reads.leaves.values():  # an own forward may mix tokens
        forward = vars(leaf).get("forward", ABSENT)
        yield Watched(leaf, dict.get, vars(leaf), "forward", forward)
        if may_be_idle(leaf):  # programs leave out its call
            yield Watched(leaf, dict.get, vars(leaf), "training", leaf.training)
    for owner_id, name in reads.missing:
        owner = reads.objects[owner_id]
        yield Watched(owner, looks.is_there, owner, name, False)
    for (owner_id, name), names in reads.tables.items():
        owner = reads.objects[owner_id]
        yield Watched(owner, looks.names_in, owner, name, names)
    for owner in owners:
        yield Watched(owner, looks.class_of, owner, "__class__", type(owner))
        if hasattr(owner, "__dict__") and not isinstance(owner, type):
            yield Watched(owner, looks.dict_of, owner, "__dict__", vars(owner))
        if isinstance(owner, nn.Module) and owner._modules:
            yield Watched(owner, dict.get, vars(owner), "_modules", owner._modules)
    for (owner_id, name), child in reads.children.items():
        owner = reads.objects[owner_id]
        yield Watched(owner, dict.get, owner._modules, name, child)
    for owner_id, name in reads.deciding:
        held = reads.objects[owner_id]._buffers
        yield Watched(held, looks.numbers_in, held, name, looks.numbers_in(held, name, ABSENT))
    for owner_id, name in reads.tensors:
        owner = reads.objects[owner_id]
        places = {kind: getattr(owner, kind, {}) for kind in WHOLE if kind != "_modules"}
        kind, table = next(((k, p) for k, p in places.items() if name in p), ("", {}))
        if kind in ("_parameters", "_buffers"):
            yield Watched(owner, dict.get, vars(owner), kind, table)
        look = dict.get if table.get(name) is None else looks.of_tensor
        yield Watched(owner, look, table, name, look(table, name, None))
    inside = (type(inner) for value in reads.values.values() for inner in within(value))
    classes = {type(o): 0 for o in owners} | {c: 0 for c in inside if may_be_watched(c)}
    by_type = [method for cls in classes for method in _by_type(cls)]
    held = *reads.held.values(), *reads.in_spaces()
    known = Reached([*functions, *held, *map(type, owners), *by_type])
    named_in = (type(inner) for value in known.values() for inner in within(value))
    classes |= {cls: 0 for cls in named_in if may_be_watched(cls)}
    for base in {base: 0 for cls in classes for base in _own_bases(cls)}:
        yield Watched(base, looks.how_many, vars(base), "__dict__", looks.how_many(vars(base)))
        for method in vars(base).keys() & BY_TYPE:
            yield Watched(base, looks.of_itself, base, method, vars(base)[method])
    for value in {id(v): v for v in (*known.functions, *reads.held.values())}.values():
        for name in CONSTANT if isinstance(value, FunctionType) else ():
            if getattr(value, name) is not None:  # a first default changes no call that was made
                yield Watched(value, getattr, value, name, snapshot(getattr(value, name)))
        yield from _contents(value, "state")
    named = known.words()
    for owner, name in settings_named_by(known):
        yield Watched(owner, setting, owner, name, setting(owner, name))
    for holders in reads.shared():
        yield Watched(holders[0][0], looks.are_one, holders, holders[0][1], True)
    for place, name in known.names:
        if isinstance(place, type):
            yield from _of_class(place, name)
        else:
            yield Watched(place, dict.get, place, name, snapshot(place[name]))
            yield from _contents(place[name], name, whole=is_own_place(place))
    yield from _by_names_made(reads, known)
    read = {id(value): value for value in reads.values.values()}.values()
    for cls, name in ((v, name) for v in read for name in data_of(v)):  # by a name that it makes
        yield from _of_class(cls, name)
    modules = [sys.modules.get(name) for name in reads.imports]
    for module in (v for v in (*read, *modules) if isinstance(v, ModuleType)):
        for name in named & vars(module).keys():
            yield Watched(module, getattr, module, name, snapshot(getattr(module, name)))
            yield from _contents(getattr(module, name), name)


def _by_names_made(reads: Reads, known: Reached) -> Iterator[Watched]:
    """What no name in the code tells of, and what is not there."""
    spaces, lacking = dict(reads.spaces), dict[int, tuple[dict[str, Any], set[str]]]()
    for place, name in known.absent:
        table = vars(place) if isinstance(place, ModuleType) else place
        if name == "__dict__":
            spaces[id(place)] = place
        elif isinstance(place, type):
            yield Watched(place, in_class, place, name, in_class(place, name, ABSENT))
        elif name in table:  # by now: the forward itself put it there, or imported it
            yield Watched(place, dict.get, table, name, snapshot(table[name]))
        else:
            lacking.setdefault(id(table), (table, set()))[1].add(name)
    for table, names in lacking.values():
        yield Watched(table, looks.lacks, (table, frozenset(names)), "a name that it has not", True)
    if any(map(reads_classes_whole, known.codes())):
        spaces |= {id(c): c for o in reads.objects.values() for c in _own_bases(type(o))}
    for (_, name), owner in reads.by_name.items():
        if isinstance(owner, type):
            yield from _of_class(owner, name)
        else:
            value = getattr(owner, name, ABSENT)
            yield Watched(owner, getattr, owner, name, snapshot(value))
            yield from _contents(value, name)
    for space in spaces.values():
        table = vars(space) if isinstance(space, type | ModuleType) else space
        yield Watched(space, looks.names_of, table, "__dict__", looks.names_of(table))
        for name in looks.names_of(table):
            if isinstance(space, type):
                yield from _of_class(space, name)
            else:
                yield Watched(space, dict.get, table, name, snapshot(table[name]))
                yield from _contents(table[name], name)
    for name in reads.imports:
        yield Watched(name, looks.imported, name, name, looks.imported(name))
    words = known.words()
    for cls in filter(is_own_class, known.classes if "__subclasses__" in words else ()):
        yield Watched(cls, looks.subclasses, cls, "__subclasses__", looks.subclasses(cls))
    abstract = [v for v in known.values() if issubclass(type(v), ABCMeta) and is_own_class(v)]
    if abstract and words & {"isinstance", "issubclass"}:
        yield Watched(ABCMeta, looks.registered, ABCMeta, "register", looks.registered())


def _own_bases(cls: type) -> tuple[type, ...]:
    """A class and those that it derives from, but for Python's and torch's `Module`."""
    of_all = cls.__mro__.index(nn.Module if issubclass(cls, nn.Module) else object)
    return cls.__mro__[:of_all]


def _by_type(cls: type) -> list[Any]:
    """The methods of a class that Python calls by itself."""
    return [
        vars(b)[name] for b in _own_bases(cls) for name in (*BY_TYPE, LOOKUP) if name in vars(b)
    ]


def _of_class(cls: type, name: str) -> Iterator[Watched]:
    """What a class has by a name, and what is kept in it."""
    kept = in_class(cls, name, ABSENT)
    value = getattr(cls, name, ABSENT)
    if kept is not ABSENT and kept is not value:
        yield Watched(cls, in_class, cls, name, kept)
    if kept is ABSENT or kept is value or _computes(kept):  # by its metaclass, or plain
        yield Watched(cls, getattr, cls, name, snapshot(value))
        yield from _contents(value, name)
    if hasattr(type(kept), "__get__") and not isinstance(kept, CALLED):
        held = getattr(kept, "__dict__", {})
        yield Watched(kept, looks.itself, held, name, snapshot(held))
        yield from _contents(list(held.values()), name)


def _computes(kept: Any) -> bool:
    """Whether something in a class is a descriptor of a library's or the host's own, whose value
    may come from anywhere; properties and methods are traced through."""
    plain = isinstance(kept, (*CALLED, property)) or type(kept).__module__ == "functools"
    return hasattr(type(kept), "__get__") and not plain


def _contents(value: Any, name: str, whole: bool = False) -> Iterator[Watched]:
    """What is kept in something that is no attribute of a module; `whole` goes `beyond`."""
    for inner in (*within(value), *(beyond(value) if whole else ())):
        state = state_of(inner)
        plain = isinstance(inner, FunctionType) and (is_foreign(inner) or not any(state[:2]))
        if state is ABSENT or plain:
            continue
        yield Watched(inner, looks.state_now, inner, name, snapshot(state))
    if kept := _kept_by(value):  # of a registry, say of attention functions
        yield Watched(value, looks.itself, kept, name, snapshot(kept))


CONSTANT = ("__code__", "__defaults__", "__kwdefaults__")
"""What an editor's automatic reload changes of a function."""
HOOKS_OF = "hooks"
"""Name of what a program must know of the hooks that a module had."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_watched(hooks: Hooks, modules: Iterable[nn.Module]) -> Iterator[Watched]:
    """Whether there are any: those that run are looked up in each call."""
    of_all = {f"_global{n}": vars(torch_module)[f"_global{n}"] for n in HOOKS}
    for name, table in of_all.items():
        if not table:
            yield Watched(torch_module, looks.none_in, vars(torch_module), name, True)
    for module in modules:
        tables = [getattr(module, name) for name in HOOKS]
        if any(tables) or any(of_all.values()):
            yield Watched(module, hooks.look, module, HOOKS_OF, hooks.look(module, "", None))
        else:
            for name in HOOKS:
                look = looks.none_of_gradients if "backward" in name else looks.none_in
                yield Watched(module, look, vars(module), name, True)


def _kept_by(value: Any) -> list[Any]:
    """What the objects in a value hold, and the lists, sets and dicts of their classes."""
    kept = list[Any]()
    for inner in within(value):
        if may_be_watched(type(inner)):
            shared = [vars(cls) for cls in type(inner).__mro__ if may_be_watched(cls)]
            values = [v for names in shared for v in names.values()]
            kept += [vars(inner), *(v for v in values if isinstance(v, list | dict | set))]
    return kept
