"""What a trace depends on beside its inputs, and whether that is still so.

Python's answers are constants of a graph: attributes, children, classes, configs, the names that
functions look up. All of it is looked at again before a program runs, and that has to be quick:
what is looked up in one way is one list, which C code builds and compares with that of the trace.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Set
from itertools import chain, repeat
from operator import is_not
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tokenprune.private import exporting
from tokenprune.tracing.contents import ABSENT, equal, has_kinds, is_constant, kinds_of, may_mislead
from tokenprune.tracing.hooks import Hooks
from tokenprune.tracing.looks import (
    OF_TENSOR,
    class_of,
    dict_of,
    itself,
    none_in,
    none_of_gradients,
    of_tensor,
    state_now,
)
from tokenprune.tracing.reads import Reads
from tokenprune.tracing.watched import (
    DIFFERS,
    HOOKS_OF,
    WHOLE,
    Watched,
    all_watched,
    hooks_watched,
)

__all__ = ["HOOKS_OF", "Guards", "Watched"]


class Alike:
    """Many values that are looked up in one way."""

    def __init__(self, watched: list[Watched]) -> None:
        self._look = look = watched[0].look
        there = [look(one.table, one.name, ABSENT) for one in watched]
        # what `==` may call equal though it is not
        mislead = [look is not of_tensor and has_kinds(value) for value in there]
        kept = [
            m and _needs_no_look(*each) for m, *each in zip(mislead, watched, there, strict=True)
        ]
        # in front: the very same number or word is of the same kind
        order = sorted(range(len(watched)), key=lambda n: not kept[n])
        self.watched = [watched[n] for n in order]
        self._tables = [one.table for one in self.watched]
        self._names = [one.name for one in self.watched]
        self._expected = [one.expected for one in self.watched]
        self._held = [there[n] for n in order if kept[n]]
        self._rest = self._expected[len(self._held) :]
        now = [there[n] for n in order]
        self._kinds = [(at, self._kind(at, now)) for at, n in enumerate(order) if mislead[n]]
        self._others = [(at, kind) for at, kind in self._kinds if at >= len(self._held)]
        self._tensors = self._facts_of_tensors() if look is of_tensor else None

    def _facts_of_tensors(self) -> tuple[list[Any], list[Any]]:
        tensors = list(map(dict.get, self._tables, self._names))
        return list(map(type, tensors)), list(map(OF_TENSOR, tensors))

    def _same_tensors(self) -> bool:
        """Whether tensors are as they were, of torch's very classes too: by C code alone."""
        return self._facts_of_tensors() == self._tensors

    def _kind(self, n: int, now: list[Any]) -> Any:
        value = now[n]
        if _is_table(self.watched[n], value):
            return id(value)
        stored = self.watched[n].stored and may_mislead(value)
        return type(value), kinds_of(value) if stored else None

    def same(self) -> bool:
        """Whether all are as they were."""
        try:
            if self._look is none_of_gradients and not torch.is_grad_enabled():
                return True
            if self._look in (none_in, none_of_gradients):
                return not any(map(dict.get, self._tables, self._names))
            if self._look is of_tensor and self._same_tensors():
                return True
            if self._look is class_of:
                return list(map(type, self._tables)) == self._expected
            if self._look is dict_of:
                return not any(map(is_not, map(vars, self._tables), self._expected))
            now = list(map(self._look, self._tables, self._names, repeat(ABSENT)))
            if any(map(is_not, now, self._held)):  # of those in front
                alike, kinds = _all_equal(now, self._expected), self._kinds
            else:
                alike, kinds = _all_equal(now[len(self._held) :], self._rest), self._others
            return alike and all(self._kind(n, now) == kind for n, kind in kinds)
        except DIFFERS:
            return False


def _is_table(watched: Watched, value: Any) -> bool:
    return type(value) in (dict, OrderedDict) and watched.name in WHOLE


def _needs_no_look(watched: Watched, value: Any) -> bool:
    """Whether a value is the same as long as it is the same object."""
    return is_constant(value) or _is_table(watched, value)


def _all_equal(now: list[Any], then: list[Any]) -> bool:
    try:
        if now == then:
            return True
    except DIFFERS:  # of arrays
        pass
    return all(map(equal, now, then))


class Guards:
    """All that one trace of a host depends on.

    Args:
        reads: What was read while it was traced; the host is as it was before.
        functions: The entry points that were called.
        counted: (id of a module, name) of counters that nothing depends on.
        hooked: The modules whose hooks were asked for: those that were traced through, torch's.
        hooks: Says which hooks are the host's own.

    Attributes:
        unsteady: What is another each time somebody looks, so that nobody can watch it.
    """

    def __init__(
        self,
        reads: Reads,
        functions: Iterable[Any],
        counted: Set[tuple[int, str]] = frozenset(),
        hooked: Iterable[nn.Module] = (),
        hooks: Hooks | None = None,
    ) -> None:
        self.unsteady: list[Watched] = []
        alike: dict[Any, dict[Any, Watched]] = {}
        of_hooks = hooks_watched(hooks, hooked) if hooks else ()
        for watched in chain(all_watched(reads, functions), of_hooks):
            if (id(watched.owner), watched.name) in counted:
                continue
            if watched.same():
                place = (id(watched.table), watched.name)
                alike.setdefault(watched.look, {})[place] = watched
            elif not watched.steady():
                self.unsteady.append(watched)
            # else the forward itself wrote it before it was read
        self._alike = [Alike(list(group.values())) for group in alike.values()]
        self._near = WeakKeyDictionary[nn.Module, list[Watched]]()

    def hold(self) -> bool:
        """Whether a trace made now would read the same."""
        if exporting():
            return all(watched.same() or watched.wrapped_by_fx() for watched in self)
        return all(group.same() for group in self._alike)

    def __iter__(self) -> Iterator[Watched]:
        for group in self._alike:
            yield from group.watched

    def changed(
        self, near: nn.Module | None = None, which: Callable[[Watched], bool] = lambda _: True
    ) -> Watched | None:
        """The first value that is not what it was: of all, or of those that a module and what is in
        it hold, less weights, which hooks of accelerate and FSDP move; `which` are of interest."""
        if near is not None and near not in self._near:
            held = {id(v) for m in near.modules() for v in (m, *vars(m).values())}
            kept = (w for w in self if w.look in (dict.get, getattr, dict_of, state_now, itself))
            self._near[near] = [w for w in kept if id(w.owner) in held]
        known = self if near is None else self._near[near]
        return next((watched for watched in known if which(watched) and not watched.same()), None)
