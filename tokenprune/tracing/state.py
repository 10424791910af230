"""Put back what running a host may change: attributes, buffers, modes, autocast's cache."""

import operator
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tokenprune.tracing.contents import (
    ABSENT,
    MOST_BYTES,
    has_slots_alone,
    held_in_slots,
    may_be_watched,
)
from tokenprune.tracing.effects import add, refill, written_weight
from tokenprune.tracing.reads import OF_TORCH
from tokenprune.tracing.stand_ins import is_plain

__all__ = [
    "Kept",
    "Passing",
    "Written",
    "attributes_kept",
    "buffers_kept",
    "empty_caches",
    "in_mode",
    "kept_modes",
    "no_autocast_cache",
    "same_values",
]


SEQUENCES = (list, set, deque)


class Written(NamedTuple):
    """What a forward has set, or whose contents it has changed.

    Attributes:
        owner: A module, or an object that one holds; or the list, dict or set itself that has
            changed, where that is no attribute of any.
        name: Of the attribute; empty for a list.
        before: What was there.
        value: What is there now.
        contents: Of a list that is the same one still, what was in it; None for all else.
    """

    owner: Any
    name: str
    before: Any
    value: Any
    contents: Any


class Passing:
    """A value that threads put in an attribute and take out again, whatever is traced meanwhile."""


class Kept:
    """What was in the modules of a host, in what they hold, in their classes and their files."""

    def __init__(self, root: nn.Module) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._slots: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._shared: list[int] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._files: dict[str, dict[str, Any]] = {}
        self._modules = list(root.modules())
        self._owners: dict[int, Any] = {id(vars(module)): module for module in self._modules}
        for module in self._modules:
            self._keep(vars(module), depth=4)
        owned, self._owned_slots = len(self._contents), set(self._slots)
        for cls in {cls for module in self._modules for cls in type(module).__mro__}:
            if not cls.__module__.startswith(("torch", "builtins")):
                values = _data(vars(cls))
                self._classes.append((cls, values))
                self._keep(list(values.values()), depth=2)
                if cls.__module__ in sys.modules:
                    self._files[cls.__module__] = vars(sys.modules[cls.__module__])
                    self._keep(self._files[cls.__module__], depth=2)
        self._shared = list(self._contents)[owned:]

    def _keep(self, value: Any, depth: int) -> None:
        if may_be_watched(type(value)) or isinstance(value, SimpleNamespace):
            owner, value = value, vars(value)
            self._owners.setdefault(id(value), owner)
        if id(value) in self._contents or id(value) in self._slots or not depth:
            return
        if has_slots_alone(type(value)):
            self._slots[id(value)] = value, held_in_slots(value)
            for inner in self._slots[id(value)][1].values():
                self._keep(inner, depth - 1)
        if isinstance(value, np.ndarray) and value.nbytes <= MOST_BYTES:
            self._contents[id(value)] = value, value.copy()
        elif issubclass(type(value), (*SEQUENCES, dict)):  # a Mock says what it is
            contents = _staying(value) if isinstance(value, dict) else list(value)
            self._contents[id(value)] = value, contents
            for inner in contents.values() if isinstance(contents, dict) else contents:
                self._keep(inner, depth - 1)

    def written(self) -> Iterator[Written]:
        """What has been set since, or changed in place."""
        for owner, name, before in self._set_in_slots():
            if id(owner) in self._owned_slots:
                yield Written(owner, name, before, getattr(owner, name, ABSENT), None)
        seen = set(self._shared)
        for holder, owner in self._owners.items():
            if holder in self._contents and holder not in seen:
                values, before = self._contents[holder]
                seen |= {holder, *map(id, dict(values).values())}
                yield from self._set_in(owner, dict(values), before)
        for place, (kept, contents) in self._contents.items():
            if place not in seen and not _same(kept, contents):
                yield Written(kept, "", kept, kept, contents)

    def _set_in(self, owner: Any, values: Any, before: Any) -> Iterator[Written]:
        """The attributes of a module, or of another object."""
        if isinstance(owner, nn.Module):
            yield from self._rebound(owner)
            values = {n: v for n, v in values.items() if n not in OF_TORCH and n != "_modules"}
        for name in before.keys() - dict(vars(owner)).keys():
            yield Written(owner, name, before[name], ABSENT, None)
        for name, value in values.items():
            kept, contents = self._contents.get(id(value), (value, value))
            if value is not before.get(name, ABSENT):
                yield Written(owner, name, before.get(name), value, None)
            elif not _same(kept, contents) and id(value) not in self._owners:
                yield Written(owner, name, value, value, contents)

    def _set_in_slots(self) -> Iterator[tuple[Any, str, Any]]:
        """The slots that hold something else: of which object, the name, and what was there."""
        for owner, before in self._slots.values():
            for name, value in before.items():
                if getattr(owner, name, ABSENT) is not value:
                    yield owner, name, value

    def _rebound(self, module: nn.Module) -> Iterator[Written]:
        """Buffers and parameters that are others now, or new."""
        for table in (module._buffers, module._parameters):
            _, before = self._contents.get(id(table), (table, table))
            for name, value in table.items():
                if value is not before.get(name, ABSENT):
                    yield Written(module, name, before.get(name), value, None)

    def hooked(self) -> bool:
        """Whether the forward has registered hooks, which a program does not do."""
        tables = [vars(module)["_forward_hooks"] for module in self._modules]
        return any(not _same(*self._contents[id(table)]) for table in tables)

    def shared(self) -> Iterator[Any]:
        """What of it no module holds, and has been changed since."""
        for kept, contents in map(self._contents.__getitem__, self._shared):
            if not _same(kept, contents):
                yield kept
        for cls, values in self._classes:
            now = _data(vars(cls))
            yield from (value for name, value in now.items() if value is not values.get(name))

    def elsewhere(self) -> Iterator[tuple[str, Any]]:
        """What of classes and files has been set or changed in place: its name, and what it is."""
        held: list[tuple[str, Mapping[str, Any], dict[str, Any]]]
        held = [(cls.__qualname__, vars(cls), values) for cls, values in self._classes]
        held += [(name, file, self._contents[id(file)][1]) for name, file in self._files.items()]
        for where, table, before in held:
            for name, value in _data(table).items():
                kept, contents = self._contents.get(id(value), (value, value))
                if value is not before.get(name, ABSENT) or not _same(kept, contents):
                    yield f"{where}.{name}", value
        for owner, name, _ in self._set_in_slots():
            if id(owner) not in self._owned_slots:
                yield f"{type(owner).__qualname__}.{name}", getattr(owner, name, ABSENT)

    def put_back(self) -> None:
        """Make everything what it was; what is the same is not touched."""
        for cls, values in self._classes:
            for name in _data(vars(cls)).keys() - values.keys():
                delattr(cls, name)
            for name, value in values.items():
                if vars(cls).get(name, ABSENT) is not value:
                    setattr(cls, name, value)
        for owner, name, value in self._set_in_slots():
            if value is ABSENT:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, value)
        for kept, contents in self._contents.values():
            if _same(kept, contents):
                continue
            if isinstance(kept, np.ndarray):
                kept[...] = contents
            elif isinstance(kept, SEQUENCES):
                refill(kept, contents)
            else:  # `Passing` values stay
                for name in _staying(kept).keys() - contents.keys():
                    del kept[name]
                add(kept, contents)
                for key in contents if isinstance(kept, OrderedDict) else ():
                    kept.move_to_end(key)


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[Kept]:
    """Give every module its attributes back, hooks included: a host may write to itself in forward
    (a cache, a window size, a capturing hook), and a value of a trace must not stay there."""
    kept = Kept(root)
    try:
        yield kept
    finally:
        kept.put_back()


def empty_caches(root: nn.Module) -> None:
    """Take out what hosts have computed from their parameters and keep for the next call (LeViT's
    position biases): a trace computes it again. To be used inside `attributes_kept`."""
    for module in root.modules():
        for name, value in dict(vars(module)).items():
            cache = value if "cache" in name and isinstance(value, dict) else {}
            if all(isinstance(kept, torch.Tensor) for kept in cache.values()):
                cache.clear()


@contextmanager
def buffers_kept(root: nn.Module, graphs: Iterable[fx.Graph] = ()) -> Iterator[None]:
    """Give every buffer its values back, since some hosts count their calls in one; and every
    parameter that one of these graphs of the host writes into."""
    paths = {path for g in graphs for node in g.nodes if (path := written_weight(node)) is not None}
    written = [p for path, p in root.named_parameters() if path in paths] if paths else ()
    own = (b for b in (*root.buffers(), *written) if is_plain(b) and not b.is_meta)
    before = [(buffer, buffer.clone()) for buffer in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                if not same_values(buffer, values):
                    buffer.copy_(values)


def same_values(one: Tensor, other: Tensor) -> bool:
    """`torch.equal`, of float8 too, with which torch cannot compute."""
    small = one.is_floating_point() and one.dtype.itemsize == 1 and one.dtype == other.dtype
    if small:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own training flag back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A model in training or eval mode, and afterwards as it was: a `train` of the host's own may
    set attributes, freeze weights or change them."""
    modules = list(model.modules())
    with ExitStack() as stack:
        if any(module.training != training for module in modules):
            stack.enter_context(kept_modes(model))
            own = [module for module in modules if _switches(module)]
            if own:
                stack.enter_context(attributes_kept(model))
                stack.enter_context(_tensors_kept(own))
            (model.train if training else model.eval)()
        yield


def _switches(module: nn.Module) -> bool:
    """Whether a module has a `train` or `eval` that is not torch's."""
    methods = (getattr(getattr(module, n), "__func__", None) for n in ("train", "eval"))
    return tuple(methods) != (nn.Module.train, nn.Module.eval)


@contextmanager
def _tensors_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give the parameters and buffers in modules their memory, values and `requires_grad` back."""
    held = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values()
    asked = [(tensor, tensor.requires_grad) for tensor in held]
    plain = [t for t in held if is_plain(t) and not t.is_meta]
    before = [(tensor, tensor.data, tensor.detach().clone()) for tensor in plain]
    try:
        yield
    finally:
        for tensor, memory, values in before:
            if tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            if not torch.equal(memory, values):
                memory.copy_(values)
        for tensor, requires_grad in asked:
            tensor.requires_grad_(requires_grad)


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Autocast keeps the weights it has cast, and `parametrize.cached` those it has computed; those
    of fake tensors must not be kept."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with mock.patch.object(parametrize, "_cache_enabled", 0):
            yield
    finally:
        torch.set_autocast_cache_enabled(was)


def _data(names: Mapping[str, Any]) -> dict[str, Any]:
    """What in a class or a file is no function and no class."""
    return {n: v for n, v in dict(names).items() if n[:2] != "__" and not callable(v)}


def _staying(values: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in dict(values).items() if not isinstance(value, Passing)}


def _same(ours: Any, theirs: Any) -> bool:
    """Whether a container holds the objects that it held; what they hold is not compared."""
    if isinstance(ours, np.ndarray):
        return bool(ours.tobytes() == theirs.tobytes())
    if not issubclass(type(ours), (*SEQUENCES, dict)) or len(ours) != len(theirs):
        return ours is theirs
    if isinstance(ours, set):
        return set(map(id, ours)) == set(map(id, theirs))
    if not isinstance(ours, dict):
        return all(map(operator.is_, ours, theirs))
    # by dict's own methods: those of a class of the host's may import what it holds
    ordered = not isinstance(ours, OrderedDict) or list(dict.keys(ours)) == list(dict.keys(theirs))
    return ordered and all(dict.get(ours, key, ours) is v for key, v in dict.items(theirs))
