"""What is watched of all that Python read while a host was traced, and how it is looked up."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tokenprune.tracing.contents import (
    ABSENT,
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
from tokenprune.tracing.names import CALLED, Reached, data_of, is_foreign
from tokenprune.tracing.reads import Reads
from tokenprune.tracing.settings import setting, settings_named_by

__all__ = [
    "DIFFERS",
    "OF_TENSOR",
    "WHOLE",
    "Watched",
    "all_watched",
    "class_of",
    "hooks_watched",
    "itself",
    "none_in",
    "none_of_gradients",
    "of_tensor",
    "state_now",
]

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
        return self.look in (dict.get, in_class, state_now, itself)

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
        kept = in_class(type(owner), name, ABSENT)
        if kept is not ABSENT:
            yield from _of_class(type(owner), name)
        if kept is ABSENT or _computes(kept):  # made up by `__getattr__`, or by a descriptor
            yield Watched(owner, getattr, owner, name, snapshot(getattr(owner, name, ABSENT)))
    for leaf in reads.leaves.values():  # an own forward may mix tokens
        forward = vars(leaf).get("forward", ABSENT)
        yield Watched(leaf, dict.get, vars(leaf), "forward", forward)
    for owner_id, name in reads.missing:
        owner = reads.objects[owner_id]
        yield Watched(owner, _is_there, owner, name, False)
    for (owner_id, name), names in reads.tables.items():
        owner = reads.objects[owner_id]
        yield Watched(owner, _names_in, owner, name, names)
    for owner in owners:
        yield Watched(owner, class_of, owner, "__class__", type(owner))
        if hasattr(owner, "__dict__") and not isinstance(owner, type):
            yield Watched(owner, getattr, owner, "__dict__", vars(owner))
        if isinstance(owner, nn.Module) and owner._modules:
            yield Watched(owner, dict.get, vars(owner), "_modules", owner._modules)
    for (owner_id, name), child in reads.children.items():
        owner = reads.objects[owner_id]
        yield Watched(owner, dict.get, owner._modules, name, child)
    for owner_id, name in reads.tensors:
        owner = reads.objects[owner_id]
        places = {kind: getattr(owner, kind, {}) for kind in WHOLE if kind != "_modules"}
        kind, table = next(((k, p) for k, p in places.items() if name in p), ("", {}))
        if kind in ("_parameters", "_buffers"):
            yield Watched(owner, dict.get, vars(owner), kind, table)
        look = dict.get if table.get(name) is None else of_tensor
        yield Watched(owner, look, table, name, look(table, name, None))
    inside = (type(inner) for value in reads.values.values() for inner in within(value))
    classes = {type(o): 0 for o in owners} | {c: 0 for c in inside if may_be_watched(c)}
    by_type = [method for cls in classes for method in _by_type(cls)]
    known = Reached([*functions, *reads.held.values(), *map(type, owners), *by_type])
    named_in = (type(inner) for value in known.values() for inner in within(value))
    classes |= {cls: 0 for cls in named_in if may_be_watched(cls)}
    for base in {base: 0 for cls in classes for base in _own_bases(cls)}:
        yield Watched(base, _how_many, vars(base), "__dict__", _how_many(vars(base)))
        for method in vars(base).keys() & BY_TYPE:
            yield Watched(base, _of_itself, base, method, vars(base)[method])
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
            yield from _of_class(place, name)
        else:
            yield Watched(place, dict.get, place, name, snapshot(place[name]))
            yield from _contents(place[name], name)
    read = {id(value): value for value in reads.values.values()}.values()
    for cls, name in ((v, name) for v in read for name in data_of(v)):  # by a name that it makes
        yield from _of_class(cls, name)
    for module in (v for v in read if isinstance(v, ModuleType)):  # `self.config_module.scale`
        for name in named & vars(module).keys():
            yield Watched(module, getattr, module, name, snapshot(getattr(module, name)))
            yield from _contents(getattr(module, name), name)


def _own_bases(cls: type) -> tuple[type, ...]:
    """A class and those that it derives from, but for Python's and torch's `Module`."""
    of_all = cls.__mro__.index(nn.Module if issubclass(cls, nn.Module) else object)
    return cls.__mro__[:of_all]


def _by_type(cls: type) -> list[Any]:
    """The methods of a class that Python calls by itself."""
    return [
        vars(b)[name] for b in _own_bases(cls) for name in (*BY_TYPE, LOOKUP) if name in vars(b)
    ]


def _how_many(names: Mapping[str, Any], _name: str = "", _absent: Any = None) -> int:
    """How many names a class has: a new one may hide what its objects hold. Less what Python puts
    there when it copies objects or is asked for annotations."""
    return len(names) - ("__slotnames__" in names) - ("__annotations__" in names)


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
        yield Watched(kept, itself, held, name, snapshot(held))
        yield from _contents(list(held.values()), name)


def _computes(kept: Any) -> bool:
    """Whether something in a class is a descriptor of a library's or the host's own, whose value
    may come from anywhere; properties and methods are traced through."""
    plain = isinstance(kept, (*CALLED, property)) or type(kept).__module__ == "functools"
    return hasattr(type(kept), "__get__") and not plain


def _contents(value: Any, name: str) -> Iterator[Watched]:
    """What is kept in something that is no attribute of a module."""
    for inner in within(value):
        state = state_of(inner)
        plain = isinstance(inner, FunctionType) and (is_foreign(inner) or not any(state[:2]))
        if state is ABSENT or plain:
            continue
        yield Watched(inner, state_now, inner, name, snapshot(state))
    if kept := _kept_by(value):  # of a registry, say of attention functions
        yield Watched(value, itself, kept, name, snapshot(kept))


CONSTANT = ("__code__", "__defaults__", "__kwdefaults__")
"""What an editor's automatic reload changes of a function."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_watched(hooks: Hooks, modules: Iterable[nn.Module]) -> Iterator[Watched]:
    """Whether there are any: those that run are looked up in each call."""
    of_all = {f"_global{n}": vars(torch_module)[f"_global{n}"] for n in HOOKS}
    for name, table in of_all.items():
        if not table:
            yield Watched(torch_module, none_in, vars(torch_module), name, True)
    for module in modules:
        tables = [getattr(module, name) for name in HOOKS]
        if any(tables) or any(of_all.values()):
            yield Watched(module, hooks.look, module, "hooks", hooks.look(module, "", None))
        else:
            for name in HOOKS:
                look = none_of_gradients if "backward" in name else none_in
                yield Watched(module, look, vars(module), name, True)


def _items(children: dict[str, nn.Module], _name: str, _absent: Any) -> list[Any]:
    return list(children.items())  # in their order


OF_TENSOR = attrgetter("dtype", "device", "shape")


def of_tensor(table: dict[str, Tensor], name: str, _absent: Any) -> Any:
    tensor = table[name]
    return OF_TENSOR(tensor), _own_class(type(tensor))


def _own_class(cls: type) -> type | None:
    """A class of the host's own; torch changes those of its own, to shard weights say."""
    return None if str(cls.__module__).partition(".")[0] == "torch" else cls


def itself(table: Any, _name: str, _absent: Any) -> Any:
    return table


def _names_in(owner: Any, name: str, _absent: Any) -> list[str]:
    return list(getattr(owner, name))


def _of_itself(cls: type, name: str, absent: Any) -> Any:
    """A method that a class itself defines; traces put others into torch's classes."""
    return vars(cls).get(name, absent)


def class_of(owner: Any, _name: str, _absent: Any) -> type:
    return type(owner)


def state_now(value: Any, _name: str, _absent: Any) -> Any:
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


def none_in(table: dict[str, Any], name: str, _absent: Any) -> bool:
    return not table.get(name)


def none_of_gradients(table: dict[str, Any], name: str, absent: Any) -> bool:
    """Hooks of the backward pass are no matter where there is none."""
    return not torch.is_grad_enabled() or none_in(table, name, absent)


def _kept_by(value: Any) -> list[Any]:
    """What the objects in a value hold, and the lists, sets and dicts of their classes."""
    kept = list[Any]()
    for inner in within(value):
        if may_be_watched(type(inner)):
            shared = [vars(cls) for cls in type(inner).__mro__ if may_be_watched(cls)]
            values = [v for names in shared for v in names.values()]
            kept += [vars(inner), *(v for v in values if isinstance(v, list | dict | set))]
    return kept
