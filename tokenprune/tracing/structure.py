"""How a value is built of its leaves: a trace finds it out, and a call builds it again."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenprune.private import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Structure"]


@dataclass(frozen=True)
class _Object:
    """An object of no container type, whose attributes are leaves too.

    Attributes:
        empty: A copy of it without attributes.
        attributes: The structure of them.
    """

    empty: Any
    attributes: "Structure"


@dataclass(frozen=True)
class Structure:
    """Nested containers and objects.

    Attributes:
        spec: Of the containers.
        objects: Which of their entries are objects that are opened.
    """

    spec: TreeSpec
    objects: Mapping[int, _Object]

    @classmethod
    def of(cls, value: Any, opens: Callable[[Any], bool]) -> tuple["Structure", list[Any]]:
        """The structure of `value`, and its leaves; `opens` says which objects are opened."""
        entries, spec = tree_flatten(value)
        objects, leaves = dict[int, _Object](), list[Any]()
        for place, entry in enumerate(entries):
            if not opens(entry):
                leaves.append(entry)
                continue
            attributes, inner = cls.of(dict(vars(entry)), opens)
            empty = copy.copy(entry)
            vars(empty).clear()
            objects[place] = _Object(empty, attributes)
            leaves += inner
        return cls(spec, objects), leaves

    def build(self, leaves: Sequence[Any]) -> Any:
        """A value of this structure."""
        return self._built(iter(leaves))

    def _built(self, leaves: Iterator[Any]) -> Any:
        entries = []
        for place in range(self.spec.num_leaves):
            kept = self.objects.get(place)
            if kept is None:
                entries.append(next(leaves))
                continue
            made = copy.copy(kept.empty)
            vars(made).update(kept.attributes._built(leaves))
            entries.append(made)
        return tree_unflatten(entries, self.spec)

    def leaves_of(self, value: Any) -> list[Any] | None:
        """The leaves of another value; None if it is built otherwise."""
        entries, spec = tree_flatten(value)
        if spec != self.spec:
            return None
        leaves: list[Any] = []
        for place, entry in enumerate(entries):
            kept = self.objects.get(place)
            if kept is None:
                leaves.append(entry)
                continue
            if type(entry) is not type(kept.empty):
                return None
            inner = kept.attributes.leaves_of(dict(vars(entry)))
            if inner is None:
                return None
            leaves += inner
        return leaves
