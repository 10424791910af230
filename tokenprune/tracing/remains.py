"""What a forward leaves behind: in attributes, which a program sets too, and elsewhere."""

import gc
import operator
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import CellType, CodeType
from typing import Any, cast
from weakref import ref

from torch import Tensor, fx, nn

from tokenprune.private import tree_leaves
from tokenprune.tracing.contents import ABSENT, slots_of
from tokenprune.tracing.counters import (
    only_counted,
    only_grown,
    sets_around,
    sets_globally,
    takes_out,
    trims,
)
from tokenprune.tracing.effects import Add, Count, Delete, Refill, Store, of_content, refill
from tokenprune.tracing.handed import HandedProxy
from tokenprune.tracing.names import Reached
from tokenprune.tracing.provenance import Provenance
from tokenprune.tracing.proxy import ValueProxy, concrete
from tokenprune.tracing.state import Kept, Written

__all__ = ["CannotRepeatError", "Remains", "let_go", "nodes_in", "remains_of", "taken_out"]

Place = tuple[int, str]
"""The id of a module, and the name of an attribute."""
Effects = list[tuple[Store, Any]]
"""Their values hold proxies, so nothing may keep them."""


@dataclass
class Remains:
    """What one forward has left.

    Attributes:
        counted: Attributes that it counts, or adds to, and nothing reads.
        elsewhere: Tensors that depend on the inputs, in lists and dicts that no module holds.
        lost: Names of what it changes, which a program does not.
    """

    counted: set[Place] = field(default_factory=set)
    elsewhere: list[fx.Node] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class CannotRepeatError(NotImplementedError):
    """A forward changes a list, dict or set in a way that no program can repeat."""

    def __init__(self, entry: Written) -> None:
        kind = type(entry.owner).__name__
        place = f"{entry.name!r} of a {kind}" if entry.name else f"a {kind} inside of another"
        super().__init__(
            f"the forward puts something into {place} and "
            "takes some out, or puts it elsewhere than at the end, which a pruned call cannot "
            "repeat; only add to it, or empty it by clear() first"
        )
        nodes = nodes_in(entry.value)
        self.where = next(iter(nodes)).meta["where"] if nodes else None


def remains_of(
    kept: Kept, graph: fx.Graph, reached: Reached, ran: Iterable[CodeType]
) -> tuple[Remains, Effects]:
    """What the forward that made `graph` has left, and what a program does to leave it too; what is
    `reached` may have run, the code in `ran` has.

    Left out are tensors that do not depend on what the inputs hold: those are computed again, and a
    pruned program may hold parts of them only. Where the forward has registered hooks, so is what
    holds no tensor: a note that hooks are there must not stay without the hooks.
    """
    found, effects, content, hooked = Remains(), Effects(), of_content(graph), kept.hooked()
    codes = reached.codes()
    for entry in kept.written():
        place, nodes = (id(entry.owner), entry.name), nodes_in(entry.value)
        tensors = {node for node in nodes if isinstance(node.meta["val"], Tensor)}
        if _counts(entry, codes):
            found.counted.add(place)
            step = entry.value - entry.before
            effects.append((Count(entry.owner, entry.name), step))
        elif (tensors <= content or _of_itself(entry, tensors)) and (nodes or not hooked):
            target, value = _effect(entry, codes)
            grown = isinstance(target, Add) and only_grown(codes, entry.name)
            if grown:
                found.counted.add(place)
            effects.append((target, value))
    found.elsewhere = [node for value in kept.shared() for node in nodes_in(value) & content]
    found.lost = [name for name, value in kept.elsewhere() if not nodes_in(value)]
    closed = [f for f in reached.functions if all(c != CellType() for c in f.__closure__ or ())]
    found.lost += [f"{n} ({f.__qualname__})" for f in closed for n in sets_around(f.__code__)]
    found.lost += [f"{n} ({code.co_qualname})" for code in ran for n in sets_globally(code)]
    return found, effects


def nodes_in(value: Any) -> set[fx.Node]:
    """The nodes of the proxies in containers."""
    proxies = (leaf for leaf in tree_leaves(value) if type(leaf) in (ValueProxy, HandedProxy))
    return {proxy.node for proxy in proxies}


def let_go(module: nn.Module) -> None:
    """Take proxies out of a module that a forward has made, which something may still know."""
    for held in (module._parameters, module._buffers, vars(module)):
        for name in [name for name, value in held.items() if nodes_in(value)]:
            del held[name]


def taken_out(proxies: Iterable["ref[ValueProxy]"]) -> Provenance | None:
    """Take proxies out of lists and dicts where they have stayed; where in the host the first of
    them was made, if there are any."""
    if not any(proxy() is not None for proxy in proxies):
        return None
    gc.collect()
    found = [proxy for proxy in (one() for one in proxies) if proxy is not None]
    for proxy in found:
        for holder in gc.get_referrers(proxy):
            if isinstance(holder, list | set | deque) and holder is not found:
                refill(holder, [entry for entry in holder if entry is not proxy])
            elif isinstance(holder, dict):
                for key in [key for key, entry in holder.items() if entry is proxy]:
                    del holder[key]
            elif isinstance(holder, CellType):
                holder.cell_contents = None
            elif (slots := slots_of(type(holder))) and not isinstance(holder, fx.Proxy):
                for name in [name for name in slots if getattr(holder, name, None) is proxy]:
                    setattr(holder, name, None)
    return cast(Provenance, found[0].node.meta["where"]) if found else None


def _of_itself(entry: Written, tensors: set[fx.Node]) -> bool:
    """Whether an attribute's new value is computed from the one before: a running number."""
    reads, waiting = set[fx.Node](), list(tensors)
    while waiting:
        node = waiting.pop()
        if node not in reads:
            reads.add(node)
            waiting += node.all_input_nodes
    names = {str(node.target).rpartition(".")[2] for node in reads if node.op == "get_attr"}
    return isinstance(entry.before, Tensor) and entry.name in names


def _counts(entry: Written, codes: list[CodeType]) -> bool:
    numbers = type(entry.before) is type(entry.value) in (int, float)
    return numbers and only_counted(codes, entry.name)


def _effect(entry: Written, codes: list[CodeType]) -> tuple[Store, Any]:
    """What a program does: set, add or refill."""
    if entry.value is ABSENT:
        return Delete(entry.owner, entry.name), None
    if entry.contents is None:
        return Store(entry.owner, entry.name), _contents(entry.value)
    added = _added(entry.value, entry.contents)
    if (trims(codes, entry.name) and nodes_in(entry.value)) or _mixed(added, entry):
        raise CannotRepeatError(entry)
    if added is None or (takes_out(codes) and not only_grown(codes, entry.name)):
        return Refill(entry.owner, entry.name), _contents(entry.value)
    return Add(entry.owner, entry.name), _contents(added)


def _mixed(added: Any, entry: Written) -> bool:
    """Whether tensors of calls before are left beside new ones, or numbers stand at keys that
    depend on inputs."""
    if isinstance(added, dict):
        proxies = [v for key, v in added.items() if nodes_in([key])]
        return any(isinstance(value, int | float) for value in proxies)
    if added is not None or not isinstance(entry.value, list | deque):
        return False
    before = set(map(id, entry.contents))
    return any(id(one) in before for one in entry.value if isinstance(one, Tensor))


def _added(value: Any, before: Any) -> Any:
    """What has come to a container; None if anything has gone."""
    if isinstance(value, dict):
        changed = {k: v for k, v in value.items() if v is not before.get(k, value)}
        return changed if before.keys() <= value.keys() else None
    if isinstance(value, set):
        return value - set(before) if value.issuperset(before) else None
    if isinstance(value, deque) and value.maxlen is not None:  # some have fallen out
        for out in range(len(before) + 1):
            left, now = before[out:], list(value)
            if all(map(operator.is_, now, left)) and len(now) >= len(left):
                return now[len(left) :]
    if isinstance(value, list | deque):
        stays = len(value) >= len(before) and all(map(operator.is_, value, before))
        return list(value)[len(before) :] if stays else None
    return None


def _contents(value: Any) -> Any:
    """What a node can hold: a list of what is in a set, and plain keys."""
    if isinstance(value, set | deque):
        return list(value)
    if not isinstance(value, dict):
        return value
    return {concrete(key): entry for key, entry in value.items()}
