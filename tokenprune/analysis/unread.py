"""Which rows (tokens) of which tensors nobody reads.

A head that reads the class token alone leaves all other rows of the last block unread: its queries,
projection and MLP. Backward from the readers it is asked of each node how many rows of what goes in
it needs. What acts on each token alone needs the rows that are read of it; attention needs those of
its queries, and all keys and values. That a node runs on its first rows is tried on fake tensors.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, fx, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.nodes import holds_no_tensor
from tokenprune.analysis.operators import Kind, argument, couples, kind_of
from tokenprune.private import tree_leaves
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.interpret import Environment, evaluate, quiet_trials
from tokenprune.tracing.opaque import OPAQUE

__all__ = ["Unread", "find_unread", "token_dims"]

PROBED = 211  # rows that a node is tried on: a prime, so that it looks like no other size
_COSTS = (Kind.PROJECTION, Kind.ATTENTION, Kind.CONTRACTION, Kind.EINSUM)
_BY_ROWS = (Kind.ATTENTION, Kind.SOFTMAX, Kind.CONTRACTION, Kind.EINSUM)
"""Mix tokens, but not along every dim: shapes tell which."""
_REDUCES = (Kind.MEAN, Kind.SUM, Kind.AMAX, Kind.MAX)
"""Of a dim that is gone then; tokens that are left were not mixed."""


@dataclass(frozen=True)
class Unread:
    """What can run on the first rows alone.

    Attributes:
        rows: How many rows are read.
        narrowed: Node -> the dim of it that has these rows alone then, from the right.
        slices: (node, what it reads) -> the dim of the latter, from the right, of which the node
            reads the first rows.
        numbers: (node, a size that it reads) where the size is to count these rows.
        costly: Something of what is narrowed multiplies.
        reader: The last node that reads all rows and does not just hand them on.
    """

    rows: int
    narrowed: Mapping[fx.Node, int] = field(default_factory=dict)
    slices: Mapping[tuple[fx.Node, fx.Node], int] = field(default_factory=dict)
    numbers: frozenset[tuple[fx.Node, fx.Node]] = frozenset()
    costly: bool = False
    reader: fx.Node | None = None


@quiet_trials()
def find_unread(root: nn.Module, analysis: Analysis) -> Unread:
    """What of a traced graph can run on the rows that are read."""
    with torch.no_grad(), analysis.traced.fake_mode:
        return _Search(root, analysis).result()


def token_dims(analysis: Analysis, node: fx.Node) -> list[int]:
    """Dims of a node that count all tokens, prefix tokens first; from the right."""
    value, dims = node.meta.get("val"), analysis.facts[node].dims
    if not isinstance(value, Tensor):
        return []
    return [d - value.ndim for d, t in dims.items() if t.prefix == analysis.plan.num_prefix]


class _Reads(NamedTuple):
    """What a narrowed node reads: tensors of which it needs the first rows along a dim, and sizes
    that are to count rows."""

    tensors: Mapping[fx.Node, int]
    numbers: frozenset[fx.Node]


class _Search:
    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        self.root, self.analysis, self.facts = root, analysis, analysis.facts
        self.nodes = list(analysis.traced.graph.nodes)
        self.dims = {node: self._dims(node) for node in self.nodes}
        most = analysis.plan.num_prefix  # rows that every path has at the same place
        counts = (_rows(u, n, self.dims[n]) for n in self.nodes if self.dims[n] for u in n.users)
        self.rows = max((c[1] for c in counts if c is not None and c[1] <= most), default=0)
        self.tried: dict[tuple[fx.Node, int], _Reads | None] = {}

    def result(self) -> Unread:
        barred = set[fx.Node]()
        while self.rows:
            narrowed, reads = self._backward(barred)
            refused = self._refused(narrowed, reads)
            if not refused:
                break
            barred |= refused
        else:
            narrowed, reads = {}, {}
        slices = {
            (node, used): dim
            for node, read in reads.items()
            for used, dim in read.tensors.items()
            if used not in narrowed
        }
        numbers = frozenset((node, n) for node, read in reads.items() for n in read.numbers)
        costly = any(kind_of(self.root, node) in _COSTS for node in narrowed)
        return Unread(self.rows, narrowed, slices, numbers, costly, self._reader(narrowed))

    def _dims(self, node: fx.Node) -> list[int]:
        """Token dims; of several tensors at once those of the first that is picked."""
        several = isinstance(node.meta.get("val"), tuple | list)
        picked = [n for n in node.users if _picks(n)] if several else [node]
        return token_dims(self.analysis, picked[0]) if picked else []

    def _backward(self, barred: set[fx.Node]) -> tuple[dict[fx.Node, int], dict[fx.Node, _Reads]]:
        narrowed: dict[fx.Node, int] = {}
        reads: dict[fx.Node, _Reads] = {}
        for node in reversed(self.nodes):
            if not self.dims[node] or node in barred:
                continue
            users = [user for user in node.users if not self._is_number(user)]
            asked = {self._asked(user, node, reads) for user in users}
            dim = asked.pop() if len(asked) == 1 else None
            read = None if dim is None else self._reads(node, dim)
            if dim is not None and read is not None:
                narrowed[node], reads[node] = dim, read
        return narrowed, reads

    def _asked(self, user: fx.Node, node: fx.Node, reads: Mapping[fx.Node, _Reads]) -> int | None:
        """The dim of `node` whose first rows `user` needs; None if it needs all."""
        if user in reads:
            return reads[user].tensors.get(node)
        found = _rows(user, node, self.dims[node])
        return found[0] if found is not None and found[1] <= self.rows else None

    def _is_number(self, node: fx.Node) -> bool:
        return node.op != "output" and holds_no_tensor(node.meta["val"]) and not has_effect(node)

    def _reads(self, node: fx.Node, dim: int) -> _Reads | None:
        if (node, dim) not in self.tried:
            self.tried[node, dim] = self._tried(node, dim) if self._by_rows(node, dim) else None
        return self.tried[node, dim]

    def _by_rows(self, node: fx.Node, dim: int) -> bool:
        """Whether a row of what a node returns depends on one row of what it reads, as far as the
        operator tells."""
        calls = node.op in ("call_function", "call_method", "call_module")
        if not calls or has_effect(node) or is_hook_node(node) or OPAQUE in node.meta:
            return False
        if node in self.analysis.markers:  # a stage sees all tokens
            return False
        kind = kind_of(self.root, node)
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if getattr(module, "inplace", False):  # others read what it writes into
            return False
        along = node.kwargs.get("dim")
        if kind is Kind.SOFTMAX:
            along = argument(node, 1, "dim") if module is None else getattr(module, "dim", None)
        if isinstance(along, int) and isinstance(node.meta["val"], Tensor):
            if (along - dim) % node.meta["val"].ndim == 0:  # normalises over tokens, say
                return False
        elif kind is Kind.SOFTMAX:
            return False
        if kind is Kind.BATCH_STATISTIC:
            return module is not None and not module.training
        if kind in (*_BY_ROWS, *_REDUCES):
            return True
        return kind is not Kind.ANY_LENGTH and not couples(self.root, node)

    def _tried(self, node: fx.Node, dim: int) -> _Reads | None:
        """The least that must be narrowed for a node to give `PROBED` rows along `dim`."""
        options = dict[fx.Node, list[Any]]()
        if _picks(node):
            return _Reads({node.all_input_nodes[0]: dim}, frozenset())
        given = tree_leaves((node.args, dict(node.kwargs)))
        kind = kind_of(self.root, node)
        keys = [argument(node, i, n) for i, n in ((1, "key"), (2, "value"))]
        for used in node.all_input_nodes:
            held = used.meta["val"]
            if kind is Kind.ATTENTION and used in keys:
                continue
            if kind in _BY_ROWS and given.count(used) > 1:  # one of them counts keys
                continue
            if isinstance(held, Tensor):
                tables = self.facts[node].gathers.get(used)
                prefix = self.analysis.plan.num_prefix
                of_table = {} if tables is None else tables.dims
                along = [d - held.ndim for d, t in of_table.items() if t.prefix == prefix]
                options[used] = [None, *(self.dims[used] or along)]
            elif self.facts[used].follows_tokens:
                options[used] = [None, True]
        expected = [_shape(value, [dim], PROBED) for value in _tensors(node.meta["val"])]
        choices = product(*options.values())
        for choice in sorted(choices, key=lambda c: sum(part is not None for part in c)):
            chosen = {n: part for n, part in zip(options, choice, strict=True) if part is not None}
            env: Environment = {used: used.meta["val"] for used in node.all_input_nodes}
            try:
                for used, part in chosen.items():
                    env[used] = self._probed(used, part)
                found = evaluate(self.root, node, env)
            except Exception:  # whatever it says: it does not run on these rows alone
                continue
            if [list(value.shape) for value in _tensors(found)] == expected:
                tensors = {n: d for n, d in chosen.items() if not self._is_number(n)}
                return _Reads(tensors, frozenset(chosen.keys() - tensors.keys()))
        return None

    def _probed(self, node: fx.Node, part: int) -> Any:
        """A tensor, or a size, of as many rows as are tried."""
        if self._is_number(node):
            return self._count(node, lambda n: _with_rows(n.meta["val"], self.dims[n], PROBED))
        return _with_rows(node.meta["val"], [part], PROBED)

    def _count(self, number: fx.Node, tensor: Any) -> Any:
        """A size, read of other tensors: `tensor(node)`."""
        env: Environment = {}
        for used in number.all_input_nodes:
            held = used.meta["val"]
            if isinstance(held, Tensor):
                env[used] = tensor(used)
            else:
                env[used] = self._count(used, tensor) if self._follows(used) else held
        return evaluate(self.root, number, env)

    def _follows(self, node: fx.Node) -> bool:
        return self.facts[node].follows_tokens and self._is_number(node)

    def _refused(
        self, narrowed: Mapping[fx.Node, int], reads: Mapping[fx.Node, _Reads]
    ) -> set[fx.Node]:
        """Narrowed nodes that must be whole after all: a size is read of them that is to count all
        tokens, or they do not run on slices as these lie in memory."""
        refused = {n for n in narrowed if _picks(n) and n.all_input_nodes[0] not in narrowed}
        for number in filter(self._follows, self.nodes):
            sources = set(self._read_of(number)) & narrowed.keys()
            readers = [u for u in number.users if not self._is_number(u)]
            if any(u not in reads or number not in reads[u].numbers for u in readers):
                refused |= sources
        env: Environment = {}

        def whole_or_rows(node: fx.Node) -> Any:
            return env[node] if node in env else _sliced(node, self.dims[node], self.rows)

        for node in (n for n in self.nodes if n in narrowed and n not in refused):
            if any(used in narrowed and used not in env for used in reads[node].tensors):
                continue  # of one that is refused
            given: Environment = {}
            for used in node.all_input_nodes:
                dim = reads[node].tensors.get(used)
                if used in reads[node].numbers:
                    given[used] = self._count(used, whole_or_rows)
                elif dim is not None:
                    given[used] = env[used] if used in narrowed else _sliced(used, [dim], self.rows)
                else:
                    given[used] = used.meta["val"]
            try:
                env[node] = evaluate(self.root, node, given)
            except Exception:  # of strides, say
                refused.add(node)
        return refused

    def _read_of(self, number: fx.Node) -> Iterator[fx.Node]:
        """The tensors that a size is read of."""
        for used in number.all_input_nodes:
            if isinstance(used.meta["val"], Tensor):
                yield used
            elif self._follows(used):
                yield from self._read_of(used)

    def _reader(self, narrowed: Mapping[fx.Node, int]) -> fx.Node | None:
        user: fx.Node
        for user in reversed(self.nodes):
            picked = [user, *user.users]  # one of several tensors holds tokens
            hands_on = any(self.facts[n].dims for n in picked if n.op != "output")
            attends = kind_of(self.root, user) in _BY_ROWS and user not in narrowed
            if self._is_number(user) or (hands_on and not attends):
                continue
            for used in user.all_input_nodes:
                dims = [d - used.meta["val"].ndim for d in self.facts[used].dims]
                if dims and _rows(user, used, dims) is None:
                    return user
        return None


def _with_rows(value: Tensor, dims: Sequence[int], rows: int) -> Tensor:
    return value.new_empty(Size(_shape(value, dims, rows)))


def _shape(value: Tensor, dims: Sequence[int], rows: int) -> list[int]:
    shape = list(value.shape)
    for dim in dims:
        shape[dim] = rows
    return shape


def _tensors(value: Any) -> list[Tensor]:
    """A tensor, or several that one node returns."""
    values = value if isinstance(value, tuple | list) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _picks(node: fx.Node) -> bool:
    """Whether a node is one of several tensors that another returns."""
    if node.target is not operator.getitem:
        return False
    several = node.all_input_nodes[0].meta["val"]
    return isinstance(several, tuple | list) and bool(_tensors(several))


def _sliced(node: fx.Node, dims: Sequence[int], rows: int) -> Tensor:
    value: Tensor = node.meta["val"]
    for dim in dims:
        value = value.narrow(dim, 0, rows)
    return value


def _rows(user: fx.Node, node: fx.Node, dims: Sequence[int]) -> tuple[int, int] | None:
    """(dim, n) if a node reads the first n rows along a token dim of another, and no more."""
    first = user.args[0] if user.args else None
    if first is not node or not isinstance(node.meta["val"], Tensor):
        return None
    rank, name = node.meta["val"].ndim, getattr(user.target, "__name__", user.target)
    if name in ("select", "narrow") and len(user.args) > 2:
        dim, first = user.args[1], user.args[2]
        count = 1 if name == "select" else argument(user, 3, "length")
        if isinstance(dim, int) and isinstance(first, int) and isinstance(count, int):
            dim = dim % rank - rank
            return (dim, first + count) if dim in dims and first >= 0 else None
        return None
    if name != "getitem":
        return None
    asked = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    if Ellipsis in asked:
        place = asked.index(Ellipsis)
        rest = rank - (len(asked) - 1 - asked.count(None))
        asked = (*asked[:place], *[slice(None)] * rest, *asked[place + 1 :])
    parts = [part for part in asked if part is not None]
    for place, part in enumerate(parts):
        found = _last(part)
        if place - rank in dims and found is not None:
            return place - rank, found
    return None


def _last(part: Any) -> int | None:
    """How many rows from the first an index reads; None if that is not known, or all."""
    if isinstance(part, int) and not isinstance(part, bool):
        return part + 1 if part >= 0 else None
    if isinstance(part, slice):
        plain = isinstance(part.stop, int) and part.stop > 0 and (part.start or 0) >= 0
        return part.stop if plain and part.step in (None, 1) else None
    if isinstance(part, list) and part and all(isinstance(n, int) and n >= 0 for n in part):
        return int(max(part)) + 1
    return None
