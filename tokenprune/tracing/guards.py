"""What a trace depends on beside its inputs, and whether that is still so.

Python's answers are constants of a graph: attributes, children, classes, configs, the names that
functions look up. All of it is looked at again before a program runs, and that has to be quick:
what is looked up in one way is one list, which C code builds and compares with that of the trace.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from inspect import isdatadescriptor
from itertools import chain, repeat
from operator import attrgetter, is_not
from types import FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tokenprune.tracing.contents import (
    ABSENT,
    has_kinds,
    is_constant,
    kinds_of,
    may_be_watched,
    may_mislead,
    snapshot,
    state_of,
    within,
)
from tokenprune.tracing.hooks import Hooks
from tokenprune.tracing.names import Reached, data_of, is_foreign
from tokenprune.tracing.reads import Reads
from tokenprune.tracing.settings import setting, settings_named_by

__all__ = ["Guards", "Watched"]

BY_TYPE: tuple[str, ...] = (
    *("__call__", "__getattr__", "__getitem__", "__iter__", "__contains__", "__len__"),
    *("__bool__", "__int__", "__float__", "__index__"),
)
"""Methods that Python finds by the class alone."""
WHOLE = ("__dict__", "_modules")
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
            alike = type(now) is type(self.expected) or isinstance(now, list | dict | set | tuple)
            if not (alike and bool(now == self.expected)):
                return False
            return not self.stored or kinds_of(now) == kinds_of(self.expected)
        except DIFFERS:
            return False

    @property
    def stored(self) -> bool:
        """Whether what is looked up is kept there: a property may make its value anew each time."""
        if self.look is getattr:
            return isinstance(self.table, type | FunctionType | ModuleType)
        return self.look in (dict.get, _state, _itself)

    def wrapped_by_fx(self) -> bool:
        """Whether it is what `torch.fx.wrap` puts in a function's place while something traces."""
        now = self.look(self.table, self.name, ABSENT)
        return isinstance(now, FunctionType) and getattr(now, "__wrapped__", None) is self.expected


class Alike:
    """Many values that are looked up in one way."""

    def __init__(self, watched: list[Watched]) -> None:
        self.watched = watched
        self._look = watched[0].look
        self._tables = [one.table for one in watched]
        self._names = [one.name for one in watched]
        self._expected = [one.expected for one in watched]
        now = list(map(self._look, self._tables, self._names, repeat(ABSENT)))
        # what `==` may call equal though it is not
        mislead = () if self._look is _of_tensor else (n for n, v in enumerate(now) if has_kinds(v))
        kinds = {n: self._kind(n, now) for n in mislead}
        # the very same number or word is of the same kind
        self._constant = [n for n in kinds if is_constant(now[n]) or self._is_table(n, now[n])]
        self._held = [now[n] for n in self._constant]
        self._kinds, constant = list(kinds.items()), set(self._constant)
        self._others = [(n, kind) for n, kind in self._kinds if n not in constant]
        self._tensors = self._facts_of_tensors() if self._look is _of_tensor else None

    def _facts_of_tensors(self) -> tuple[list[Any], list[Any]]:
        tensors = list(map(dict.get, self._tables, self._names))
        return list(map(type, tensors)), list(map(OF_TENSOR, tensors))

    def _same_tensors(self) -> bool:
        """Whether tensors are as they were, of torch's very classes too: by C code alone."""
        return self._facts_of_tensors() == self._tensors

    def _is_table(self, n: int, value: Any) -> bool:
        return type(value) in (dict, OrderedDict) and self.watched[n].name in WHOLE

    def _kind(self, n: int, now: list[Any]) -> Any:
        value = now[n]
        if self._is_table(n, value):
            return id(value)
        stored = self.watched[n].stored and may_mislead(value)
        return type(value), kinds_of(value) if stored else None

    def same(self) -> bool:
        """Whether all are as they were."""
        try:
            if self._look is _none_of_gradients and not torch.is_grad_enabled():
                return True
            if self._look in (_none_in, _none_of_gradients):
                return not any(map(dict.get, self._tables, self._names))
            if self._look is _of_tensor and self._same_tensors():
                return True
            if self._look is _class_of:
                return list(map(type, self._tables)) == self._expected
            now = list(map(self._look, self._tables, self._names, repeat(ABSENT)))
            if now != self._expected:
                return False
            held = not any(map(is_not, map(now.__getitem__, self._constant), self._held))
            kinds = self._others if held else self._kinds
            return all(self._kind(n, now) == kind for n, kind in kinds)
        except DIFFERS:
            return False


class Guards:
    """All that one trace of a host depends on.

    Args:
        reads: What was read while it was traced; the host is as it was before.
        functions: The entry points that were called.
        counted: (id of a module, name) of counters that nothing depends on.
        hooked: The modules that were traced through.
        hooks: Says which hooks are the host's own.
    """

    def __init__(
        self,
        reads: Reads,
        functions: Iterable[Any],
        counted: Set[tuple[int, str]] = frozenset(),
        hooked: Iterable[nn.Module] = (),
        hooks: Hooks | None = None,
    ) -> None:
        # What differs already was written by the forward itself before it was read.
        alike: dict[Any, dict[Any, Watched]] = {}
        of_hooks = _watched_hooks(hooks, hooked) if hooks else ()
        for watched in chain(_watched(reads, functions), of_hooks):
            if watched.same() and (id(watched.owner), watched.name) not in counted:
                place = (id(watched.table), watched.name)
                alike.setdefault(watched.look, {})[place] = watched
        self._alike = [Alike(list(group.values())) for group in alike.values()]
        self._near = WeakKeyDictionary[nn.Module, list[Watched]]()

    def hold(self) -> bool:
        """Whether a trace made now would read the same."""
        if torch.compiler.is_exporting():
            return all(watched.same() or watched.wrapped_by_fx() for watched in self)
        return all(group.same() for group in self._alike)

    def __iter__(self) -> Iterator[Watched]:
        for group in self._alike:
            yield from group.watched

    def changed(self, near: nn.Module | None = None) -> Watched | None:
        """The first value that is not what it was: of all, or of those that a module and what is in
        it hold, less weights, which hooks of accelerate and FSDP move."""
        if near is not None and near not in self._near:
            held = {id(v) for m in near.modules() for v in (m, *vars(m).values())}
            kept = (w for w in self if w.look in (dict.get, getattr, _state, _itself))
            self._near[near] = [w for w in kept if id(w.owner) in held]
        known = self if near is None else self._near[near]
        return next((watched for watched in known if not watched.same()), None)


def _watched(reads: Reads, functions: Iterable[Any]) -> Iterator[Watched]:
    """All that was read; and, where it holds tensors that modules hold too, that they do."""
    tied: dict[int, Tensor] = {}
    for watched in _read(reads, functions):
        yield watched
        for inner in () if watched.name in WHOLE else within(watched.expected):
            if id(inner) in reads.places:
                tied[id(inner)] = inner
    for tensor_id, tensor in tied.items():
        for owner, name in reads.places[tensor_id]:
            yield Watched(owner, _holds, (owner, tensor), name, True)


def _read(reads: Reads, functions: Iterable[Any]) -> Iterator[Watched]:
    owners = list(reads.objects.values())
    for key, value in reads.values.items():
        owner, name = reads.objects[key[0]], key[1]
        if name == "_modules":
            yield Watched(owner, _items, owner._modules, name, list(value.items()))
        else:
            yield Watched(owner, dict.get, vars(owner), name, value)
    for key in reads.inherited:
        owner, name = reads.objects[key[0]], key[1]
        yield Watched(owner, dict.get, vars(owner), name, ABSENT)  # an own one would hide it
        if hasattr(type(owner), name):
            value = getattr(type(owner), name)
            yield Watched(type(owner), getattr, type(owner), name, snapshot(value))
            if isdatadescriptor(value) and not isinstance(value, property):  # of its own store
                yield Watched(owner, getattr, owner, name, snapshot(getattr(owner, name)))
        else:  # made up by `__getattr__`: a config's other name for something
            yield Watched(owner, getattr, owner, name, snapshot(getattr(owner, name, ABSENT)))
    for owner_id, name in reads.missing:
        owner = reads.objects[owner_id]
        yield Watched(owner, _is_there, owner, name, False)
    for (owner_id, name), names in reads.tables.items():
        owner = reads.objects[owner_id]
        yield Watched(owner, _names_in, owner, name, names)
    for owner in owners:
        yield Watched(owner, _class_of, owner, "__class__", type(owner))
        leaf = isinstance(owner, nn.Module) and not owner._modules
        if not leaf and hasattr(owner, "__dict__") and not isinstance(owner, type):
            yield Watched(owner, getattr, owner, "__dict__", vars(owner))
        if not leaf and isinstance(owner, nn.Module):
            yield Watched(owner, dict.get, vars(owner), "_modules", owner._modules)
    of_modules = {type(owner): BY_TYPE[:2] for owner in owners if isinstance(owner, nn.Module)}
    inside = (type(inner) for value in reads.values.values() for inner in within(value))
    plain = {cls: BY_TYPE for cls in chain(map(type, owners), inside) if may_be_watched(cls)}
    for cls, methods in (of_modules | plain).items():
        of_all = cls.__mro__.index(nn.Module if issubclass(cls, nn.Module) else object)
        for base in cls.__mro__[:of_all]:
            for method in methods:
                yield Watched(base, _of_class, base, method, vars(base).get(method, ABSENT))
    for (owner_id, name), child in reads.children.items():
        owner = reads.objects[owner_id]
        yield Watched(owner, dict.get, owner._modules, name, child)
    for owner_id, name in reads.tensors:
        owner = reads.objects[owner_id]
        places = (getattr(owner, kind, {}) for kind in ("__dict__", "_parameters", "_buffers"))
        table = next((place for place in places if name in place), {})
        look = dict.get if table.get(name) is None else _of_tensor
        yield Watched(owner, look, table, name, look(table, name, None))
    known = Reached([*functions, *reads.held.values()])
    for value in {id(v): v for v in (*known.functions, *reads.held.values())}.values():
        for name in CONSTANT if isinstance(value, FunctionType) else ():
            if getattr(value, name) is not None:  # a first default changes no call that was made
                yield Watched(value, getattr, value, name, snapshot(getattr(value, name)))
        yield from _contents(value, "state")
    named = known.words()
    for owner, name in settings_named_by(known):
        yield Watched(owner, setting, owner, name, setting(owner, name))
    for holders in reads.shared():
        yield Watched(holders[0][0], _are_one, holders, holders[0][1], True)
    for place, name in known.names:
        if isinstance(place, type):
            yield Watched(place, getattr, place, name, snapshot(getattr(place, name)))
        else:
            value = place[name]
            yield Watched(place, dict.get, place, name, snapshot(value))
            yield from _contents(value, name)
    named_values = [*known.values(), *map(type, owners)]
    read = {id(value): value for value in reads.values.values()}.values()
    data: list[tuple[Any, set[str]]] = [(v, data_of(v) & named) for v in named_values]
    data += [(v, data_of(v)) for v in read]
    data += [(v, named & vars(v).keys()) for v in read if isinstance(v, ModuleType)]
    for holder, held in data:  # `type(self).scale`, `self.config_module.scale`
        for each in held:
            value = getattr(holder, each)
            yield Watched(holder, getattr, holder, each, snapshot(value))
            yield from _contents(value, each)


def _contents(value: Any, name: str) -> Iterator[Watched]:
    """What is kept in something that is no attribute of a module."""
    for inner in within(value):
        state = state_of(inner)
        plain = isinstance(inner, FunctionType) and (is_foreign(inner) or not any(state[:2]))
        if state is ABSENT or plain:
            continue
        yield Watched(inner, _state, inner, name, snapshot(state))
    if kept := _kept_by(value):  # of a registry, say of attention functions
        yield Watched(value, _itself, kept, name, snapshot(kept))


CONSTANT = ("__code__", "__defaults__", "__kwdefaults__")
"""What an editor's automatic reload changes of a function."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _watched_hooks(hooks: Hooks, modules: Iterable[nn.Module]) -> Iterator[Watched]:
    """Whether there are any: those that run are looked up in each call."""
    of_all = {f"_global{n}": vars(torch_module)[f"_global{n}"] for n in HOOKS}
    for name, table in of_all.items():
        if not table:
            yield Watched(torch_module, _none_in, vars(torch_module), name, True)
    for module in modules:
        tables = [getattr(module, name) for name in HOOKS]
        if any(tables) or any(of_all.values()):
            yield Watched(module, hooks.look, module, "hooks", hooks.look(module, "", None))
        else:
            for name in HOOKS:
                look = _none_of_gradients if "backward" in name else _none_in
                yield Watched(module, look, vars(module), name, True)


def _items(children: dict[str, nn.Module], _name: str, _absent: Any) -> list[Any]:
    return list(children.items())  # in their order


OF_TENSOR = attrgetter("dtype", "device", "shape")


def _of_tensor(table: dict[str, Tensor], name: str, _absent: Any) -> Any:
    tensor = table[name]
    return OF_TENSOR(tensor), _own_class(type(tensor))


def _own_class(cls: type) -> type | None:
    """A class of the host's own; torch changes those of its own, to shard weights say."""
    return None if str(cls.__module__).partition(".")[0] == "torch" else cls


def _itself(table: Any, _name: str, _absent: Any) -> Any:
    return table


def _names_in(owner: Any, name: str, _absent: Any) -> list[str]:
    return list(getattr(owner, name))


def _of_class(cls: type, name: str, absent: Any) -> Any:
    """A method that a class itself defines; traces put others into torch's classes."""
    return vars(cls).get(name, absent)


def _class_of(owner: Any, _name: str, _absent: Any) -> type:
    return type(owner)


def _state(value: Any, _name: str, _absent: Any) -> Any:
    return state_of(value)


def _is_there(owner: Any, name: str, _absent: Any) -> bool:
    """Whether an object or its class has an attribute, whatever its `__getattr__` makes up."""
    if isinstance(owner, nn.Module) and any(
        name in table for table in (owner._parameters, owner._buffers, owner._modules)
    ):
        return True
    return name in getattr(owner, "__dict__", ()) or hasattr(type(owner), name)


def _are_one(places: Sequence[tuple[nn.Module, str]], _name: str, _absent: Any) -> bool:
    """Whether attributes of modules hold the same tensor."""
    held = [getattr(module, name, None) for module, name in places]
    return all(tensor is held[0] for tensor in held)


def _holds(place: tuple[Any, Tensor], name: str, _absent: Any) -> bool:
    owner, tensor = place
    return getattr(owner, name, None) is tensor


def _none_in(table: dict[str, Any], name: str, _absent: Any) -> bool:
    return not table.get(name)


def _none_of_gradients(table: dict[str, Any], name: str, absent: Any) -> bool:
    """Hooks of the backward pass are no matter where there is none."""
    return not torch.is_grad_enabled() or _none_in(table, name, absent)


def _kept_by(value: Any) -> list[Any]:
    """What the objects in a value hold, and the lists, sets and dicts of their classes."""
    kept = list[Any]()
    for inner in within(value):
        if may_be_watched(type(inner)):
            shared = [vars(cls) for cls in type(inner).__mro__ if may_be_watched(cls)]
            values = [v for names in shared for v in names.values()]
            kept += [vars(inner), *(v for v in values if isinstance(v, list | dict | set))]
    return kept
