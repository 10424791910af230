"""Blocks found in a traced graph, whatever its modules are called.

A residual sum adds something to what that was made of: `x + f(x)`. A block begins where an
attention reads the stream that its result is added to; it ends where the next block begins, or with
its last sum.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn

from tokenprune.analysis.equations import factors_of
from tokenprune.analysis.nodes import shape_of
from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.tracing.calls import ModuleCall
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["find_stretches"]

# Gates and scales: they leave every number of the stream in its place.
_GATES = (operator.mul, torch.mul, "mul", "mul_", operator.imul, operator.truediv, "div")
_INTERPOLATIONS = (torch.lerp, "lerp", "lerp_", torch.addcmul, "addcmul")
_STEPS = 4  # gates and casts between a sum and its stream


class _Sum(NamedTuple):
    """A residual sum: `total = source + f(source)`.

    Attributes:
        first: Where f begins.
        branch: The nodes of f, and those of the other way from source to total.
        made: Those of them that are made of source.
    """

    total: fx.Node
    source: fx.Node
    first: fx.Node
    branch: frozenset[fx.Node]
    made: frozenset[fx.Node]


@dataclass
class _Group:
    """The sums of one block: attentions first, then the feed-forward parts."""

    attentions: list[_Sum]
    others: list[_Sum]

    @property
    def entry(self) -> fx.Node:
        return self.attentions[0].source

    @property
    def last(self) -> fx.Node:
        return [*self.attentions, *self.others][-1].total


def find_stretches(root: nn.Module, traced: HostGraph) -> list[ModuleCall]:
    """The blocks in the order they run, each as a call of the module by which it is known: what it
    was given is the stream that it reads, what it returned the stream as it leaves."""
    return _Finder(root, traced).stretches()


class _Finder:
    def __init__(self, root: nn.Module, traced: HostGraph) -> None:
        self.root = root
        self.nodes = list(traced.graph.nodes)
        self.order = {node: number for number, node in enumerate(self.nodes)}
        self.fed: set[fx.Node] = set()  # tensors made of what an input holds, not of its size
        for node in self.nodes:
            of_input = not self.fed.isdisjoint(node.all_input_nodes)
            if (node.op == "placeholder" or of_input) and _tensors(node):
                self.fed.add(node)

    def stretches(self) -> list[ModuleCall]:
        groups = self._groups()
        spans = []
        for group, after in zip(groups, [*groups[1:], None], strict=False):
            output = group.last
            if after is not None and self._leads(group, after):
                output = after.entry
            first = min((s.first for s in group.attentions), key=self.order.__getitem__)
            spans.append((group.entry, first, output))
        inside = [self.nodes[self.order[a] : self.order[b] + 1] for _, a, b in spans]
        calls, count = [], dict[str, int]()
        for path, (entry, first, output) in zip(_labels(inside), spans, strict=True):
            number = count[path] = count.get(path, -1) + 1
            calls.append(ModuleCall(path, number, (entry,), output, first, output))
        return calls

    def _groups(self) -> list[_Group]:
        sums = list(self._sums())
        attending = [s for s in sums if self._attends(s)]
        totals, inner, done = {s.total for s in attending}, list[_Sum](), set[fx.Node]()
        for one in sorted(attending, key=lambda s: self.order[s.total]):
            if done.isdisjoint(one.branch) and not self._crosses(one):
                inner.append(one)
                done.add(one.total)
        within = frozenset[fx.Node]().union(*(s.branch for s in inner))
        feeds = [s for s in sums if s.total not in totals and s.total not in within]
        groups: list[_Group] = []
        for one in sorted([*inner, *feeds], key=lambda s: self.order[s.total]):
            open_ = groups[-1] if groups else None
            if one.total in done:
                feeds_too = self._feeds(one) or (open_ and self._feeds(open_.attentions[-1]))
                goes_on = open_ and not open_.others and self._continues(open_, one)
                if open_ and goes_on and not feeds_too:
                    open_.attentions.append(one)
                else:
                    groups.append(_Group([one], []))
            elif open_ and self._continues(open_, one):
                open_.others.append(one)
        return [part for group in groups for part in _parted(group, groups)]

    def _feeds(self, one: _Sum) -> bool:
        """Whether a feed-forward part runs beside its attention: a projection between source and
        total that no attention is part of."""
        inside = sorted(one.made - {one.source}, key=self.order.__getitem__)
        beside = [node for node in inside if not self._weighs(node)]
        after, before = {one.source}, {one.total}
        for node in beside:
            if not after.isdisjoint(node.all_input_nodes):
                after.add(node)
        for node in reversed(beside):
            if not before.isdisjoint(node.users):
                before.add(node)
        return any(kind_of(self.root, node) is Kind.PROJECTION for node in after & before)

    def _continues(self, group: _Group, other: _Sum) -> bool:
        """Whether a sum is of the stream that a block has been working on."""
        fits = shape_of(other.total) == shape_of(group.entry)
        return fits and self.order[other.source] >= self.order[group.entry]

    def _leads(self, group: _Group, after: _Group) -> bool:
        """Whether what a block returns enters the next one, normalised perhaps."""
        if shape_of(after.entry) != shape_of(group.last):
            return False
        queue, seen = [after.entry], {after.entry}
        for node in queue:
            if node is group.last:
                return True
            fresh = [
                used
                for used in node.all_input_nodes
                if used not in seen and self.order[used] >= self.order[group.last]
            ]
            seen.update(fresh)
            queue += fresh
        return False

    def _sums(self) -> Iterator[_Sum]:
        taken: set[fx.Node] = set()
        for total in reversed(self.nodes):
            if total in taken or total not in self.fed or len(shape_of(total)) < 3:
                continue
            terms = list(self._terms(total, taken))
            found = self._residual(total, terms) if len(terms) > 1 else None
            if found is not None:
                yield found

    def _terms(self, total: fx.Node, taken: set[fx.Node]) -> Iterator[fx.Node]:
        """What a node adds up; a sum that only this one reads is one of it."""
        if not self._adds(total):
            return
        for term in total.all_input_nodes:
            if shape_of(term) != shape_of(total) or term not in self.fed:
                continue
            if self._adds(term) and len(term.users) == 1:
                taken.add(term)
                yield from self._terms(term, taken)
            else:
                yield term

    def _adds(self, node: fx.Node) -> bool:
        return kind_of(self.root, node) is Kind.ADD or node.target in _INTERPOLATIONS

    def _residual(self, total: fx.Node, terms: Sequence[fx.Node]) -> _Sum | None:
        """The sum, if one of its terms is what the others were made of."""
        for term in sorted(terms, key=self.order.__getitem__):
            others = [t for t in terms if t is not term]
            for source in self._streams(term):
                start = self.order[source]
                branch = self._back(others, start)
                if source not in branch:
                    continue
                branch |= self._back([term], start)
                made = self._made(source, branch)
                if any(kind_of(self.root, n) is Kind.PROJECTION for n in made):
                    readers = [n for n in source.users if n in branch or n is total]
                    first = min(readers, key=self.order.__getitem__)
                    inside = frozenset(branch - {source})
                    return _Sum(total, source, first, inside, frozenset(made))
        return None

    def _streams(self, term: fx.Node) -> Iterator[fx.Node]:
        """A term, and the streams that it may be after gates and casts."""
        for _ in range(_STEPS):
            yield term
            passes = kind_of(self.root, term) is Kind.PASSES_ZEROS or term.target in _GATES
            same = [n for n in term.all_input_nodes if shape_of(n) == shape_of(term)]
            if not passes or not same:
                return
            term = min(same, key=self.order.__getitem__)

    def _back(self, ends: Iterable[fx.Node], start: int) -> set[fx.Node]:
        """What `ends` were made of, no earlier than node number `start`."""
        queue = list(ends)
        seen = set(queue)
        for node in queue:
            fresh = [n for n in node.all_input_nodes if n not in seen and self.order[n] >= start]
            seen.update(fresh)
            queue += fresh
        return seen

    def _made(self, source: fx.Node, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The tensors among `nodes` that were made of what `source` holds."""
        made = {source}
        for node in sorted(nodes, key=self.order.__getitem__):
            if _tensors(node) and not made.isdisjoint(node.all_input_nodes):
                made.add(node)
        return made

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors of an input that a node multiplies by each other; no mask is one."""
        factors = factors_of(self.root, node)
        return [n for n in factors if isinstance(n, fx.Node) and n in self.fed]

    def _attends(self, found: _Sum) -> bool:
        """Whether tokens are weighed against each other: data is multiplied by data."""
        return any(self._weighs(node) for node in found.made - {found.source})

    def _weighs(self, node: fx.Node) -> bool:
        return kind_of(self.root, node) is Kind.ATTENTION or len(self._factors(node)) > 1

    def _crosses(self, found: _Sum) -> bool:
        """Whether it attends to something else than the stream."""
        return any(
            factor not in found.made for node in found.made for factor in self._factors(node)
        )


def _parted(group: _Group, groups: Iterable[_Group]) -> list[_Group]:
    """Several attentions are one block if a feed-forward part follows them, and so it is in all
    blocks of this stream, which are two at least; else each is a block."""
    shape = shape_of(group.entry)
    alike = [len(g.attentions) for g in groups if g.others and shape_of(g.entry) == shape]
    if group.others and len(alike) > 1 and len(set(alike)) == 1:
        return [group]
    *first, last = group.attentions
    return [*(_Group([s], []) for s in first), _Group([last], group.others)]


def _tensors(node: fx.Node) -> bool:
    """Whether a node holds a tensor, or several."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return any(isinstance(each, torch.Tensor) for each in value)
    return isinstance(value, torch.Tensor)


def _labels(blocks: Sequence[Sequence[fx.Node]]) -> list[str]:
    """For each block the path of a module to call it by: the one that holds all that runs in it
    and in no other block; or the first of several; or the module that they share."""
    ran = [dict.fromkeys(node.meta["where"].module for node in nodes) for nodes in blocks]
    count: dict[str, int] = {}
    for path in (path for paths in ran for path in paths):
        count[path] = count.get(path, 0) + 1
    labels = []
    for nodes, paths in zip(blocks, ran, strict=True):
        around = nodes[-1].meta["where"].module  # where the sum is made, perhaps of all blocks
        inside = [path for path in paths if path != around]
        own = [path for path in paths if count[path] == 1] or inside or list(paths)
        common = _common(own)
        others = [p for other in ran if other is not paths for p in other if count[p] == 1]
        if len(own) > 1 and any(_inside(other, common) for other in others):
            deeper = next(path for path in own if path != common)
            common += ("." if common else "") + deeper.removeprefix(common).lstrip(".").split(".")[
                0
            ]
        labels.append(common)
    return labels


def _inside(path: str, holder: str) -> bool:
    return not holder or path == holder or path.startswith(f"{holder}.")


def _common(paths: Sequence[str]) -> str:
    """The path of the module that holds all of `paths`."""
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        same = (n for n, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b)
        common = common[: next(same, min(len(common), len(parts)))]
    return ".".join(common)
