"""The arguments of one call: a flat dict of tensors and plain values, and how they are nested.

A call `forward(x, labels=[{"boxes": b}])` has the leaves `x` and `labels_0_boxes`. Tensors are
inputs of a graph; everything else belongs to the signature that the graph is kept under.
"""

import keyword
import re
from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenprune.errors import HostError
from tokenprune.private import TreeSpec, keystr, tree_flatten_with_path, tree_leaves, tree_unflatten
from tokenprune.tracing.handed import Handed

__all__ = ["Arguments", "as_arguments", "flatten", "plain_key"]

PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), Enum, np.generic, torch.Size),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Nested(NamedTuple):
    """A container. `kind` is the class of an object that pytree does not know; `inner` has one
    entry for each leaf of `spec`: None, or what is nested in it."""

    kind: type | None
    spec: TreeSpec
    inner: tuple["Nested | None", ...]


Place = tuple[int | str, Nested | None]
"""Where a value goes: a position, or the name of an argument; and how it is nested."""


@dataclass(frozen=True, eq=False)
class Arguments(Mapping[str, Any]):
    """The leaves of a call by name, and their places in it.

    Attributes:
        leaves: Tensors and plain values, in the order of the call.
        places: One for each argument; hashable, holds no tensor.
    """

    leaves: dict[str, Any]
    places: tuple[Place, ...]

    def __getitem__(self, name: str) -> Any:
        return self.leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The leaves that are tensors."""
        return {name: leaf for name, leaf in self.leaves.items() if isinstance(leaf, Tensor)}

    @property
    def handed(self) -> dict[str, Any]:
        """The containers that are handed on as they are."""
        return {name: leaf.value for name, leaf in self.leaves.items() if type(leaf) is Handed}

    @property
    def handed_places(self) -> frozenset[int | str]:
        """The arguments that they are."""
        return frozenset(p for p, _, own in self._given() if own and type(self[own[0]]) is Handed)

    @property
    def inputs(self) -> dict[str, Any]:
        """What a graph is given."""
        return {**self.tensors, **self.handed}

    @property
    def containers(self) -> frozenset[int | str]:
        """The arguments that are containers of tensors."""
        held = ((place, own) for place, nested, own in self._given() if nested)
        return frozenset(p for p, own in held if any(isinstance(self[n], Tensor) for n in own))

    def handing(self, which: Collection[int | str]) -> "Arguments":
        """The same call, in which these arguments are handed on as they are, if they are
        containers."""
        if not which:
            return self
        leaves, places = dict[str, Any](), list[Place]()
        for place, nested, own in self._given():
            values = [self[name] for name in own]
            if nested is not None and place in which:
                leaves[_handed_name(place, leaves)] = Handed(_rebuilt(nested, iter(values)))
                places.append((place, None))
            else:
                leaves |= zip(own, values, strict=True)
                places.append((place, nested))
        return Arguments(leaves, tuple(places))

    def names_of(self, place: int | str) -> list[str]:
        """The leaves of an argument."""
        return next(own for p, _, own in self._given() if p == place)

    def _given(self) -> Iterator[tuple[int | str, Nested | None, list[str]]]:
        """The place, the nesting and the names of the leaves of each argument."""
        names = iter(self.leaves)
        for place, nested in self.places:
            yield place, nested, [next(names) for _ in range(_count(nested))]

    def with_images(self) -> "Arguments":
        """The arguments of a call with an empty batch, for two images: a trace needs some."""
        batched = {name: x for name, x in self.tensors.items() if x.shape[:1] == (0,)}
        return self.with_tensors({n: x.new_zeros(2, *x.shape[1:]) for n, x in batched.items()})

    def with_tensors(self, tensors: Mapping[str, Any]) -> "Arguments":
        """The same call with other tensors."""
        return Arguments({**self.leaves, **tensors}, self.places)

    def in_dtype(self, dtype: torch.dtype) -> "Arguments":
        """The same call with floating tensors in `dtype`."""
        floats = {name: x for name, x in self.tensors.items() if x.is_floating_point()}
        return self.with_tensors({name: x.to(dtype) for name, x in floats.items()})

    def of_images(self, which: slice, batch_size: int) -> "Arguments":
        """The same call with some of its images."""
        batched = {n: x[which] for n, x in self.tensors.items() if x.shape[:1] == (batch_size,)}
        handed = {n: v for n, v in self.leaves.items() if type(v) is Handed}
        return self.with_tensors(
            batched | {n: v.rows(which, batch_size) for n, v in handed.items()}
        )

    def call(self, function: Callable[..., Any], **more: Any) -> Any:
        """`function` called with these arguments, nested as they were."""
        plain = [leaf.value if type(leaf) is Handed else leaf for leaf in self.leaves.values()]
        leaves = iter(plain)
        given = [(place, _rebuilt(nested, leaves)) for place, nested in self.places]
        args = [value for place, value in given if isinstance(place, int)]
        return function(*args, **{p: v for p, v in given if isinstance(p, str)}, **more)


def flatten(
    host: str,
    given: Mapping[int | str, tuple[str, Any]],
    handed: Collection[int | str] = (),
) -> Arguments:
    """Flatten the arguments of a call of `host`: position or name -> name for leaves, value; those
    of `handed` stay as they are if they are containers.

    Raises:
        HostError: One is neither a tensor nor a plain value, nor a container of such.
    """
    leaves: dict[str, Any] = {}
    places: list[Place] = []
    for place, (name, value) in given.items():
        if isinstance(value, (Tensor, *PLAIN)):
            leaves[_free(name, leaves)] = value
            places.append((place, None))
        elif place in handed:
            leaves[_handed_name(place, leaves)] = Handed(value)
            places.append((place, None))
        else:
            places.append((place, _flattened(host, name, value, leaves)))
    return Arguments(leaves, tuple(places))


def as_arguments(host: str, given: Arguments | Mapping[str, Any]) -> Arguments:
    """The arguments of a call that gives all of them by name."""
    if isinstance(given, Arguments):
        return given
    return flatten(host, {name: (name, value) for name, value in given.items()})


def plain_key(value: Any) -> Any:
    """What tells a plain value from others: `1`, `1.0` and `True` are three, NaN is itself; one
    that is handed on is as good as another."""
    if type(value) is Handed:
        return Handed, type(value.value)
    return type(value), repr(value) if isinstance(value, float | complex) else value


def _flattened(host: str, name: str, value: Any, leaves: dict[str, Any]) -> Nested:
    contents, kind = _contents(value), None
    if contents is not None:
        value, kind = contents, type(value)
    found, spec = tree_flatten_with_path(value, is_leaf=lambda v: isinstance(v, PLAIN))
    inner: list[Nested | None] = []
    for path, leaf in found:
        inside = name + keystr(path)
        if isinstance(leaf, (Tensor, *PLAIN)):
            leaves[_free(re.sub(r"\W+", "_", inside).rstrip("_"), leaves)] = leaf
            inner.append(None)
        elif _contents(leaf) is not None:
            inner.append(_flattened(host, inside, leaf, leaves))
        else:
            raise HostError(
                f"Argument {inside} of {host} is a {type(leaf).__name__}. A wrapped model takes "
                "tensors and plain values (numbers, strings, flags, None, dtypes, devices, enums), "
                "also in tuples, lists, dicts and dataclasses. Pass what the host needs of it in "
                "such a form, or set it as an attribute of the host."
            )
    return Nested(kind, spec, tuple(inner))


def _contents(value: Any) -> dict[str, Any] | None:
    """What a container that pytree does not know holds; None if it is none, or pytree knows it."""
    if isinstance(value, type) or _known(value):
        return None
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, UserDict):
        return dict(vars(value))
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return None


def _known(value: Any) -> bool:
    leaves = tree_leaves(value, is_leaf=lambda inner: inner is not value)
    return len(leaves) != 1 or leaves[0] is not value


def _rebuilt(nested: Nested | None, leaves: Iterator[Any]) -> Any:
    if nested is None:
        return next(leaves)
    value = tree_unflatten([_rebuilt(inner, leaves) for inner in nested.inner], nested.spec)
    if nested.kind is None:
        return value
    if issubclass(nested.kind, dict):
        return nested.kind(value)
    made = nested.kind.__new__(nested.kind)
    for name, held in value.items():
        object.__setattr__(made, name, held)
    return made


def _count(nested: Nested | None) -> int:
    """How many leaves an argument has."""
    return 1 if nested is None else sum(map(_count, nested.inner))


def _handed_name(place: int | str, taken: Mapping[str, Any]) -> str:
    return _free(place if isinstance(place, str) else f"argument_{place}", taken)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name for one more leaf, which the code of a graph can use."""
    while name in taken or keyword.iskeyword(name):
        name += "_"
    return name
