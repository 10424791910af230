"""Where images keep different numbers of tokens, what acts on each token alone sees no padding.

Each node that can gets a packed twin, whose arguments are packed too (`tokenprune.ops.varlen`), and
so are the numbers that it is given: packed tokens have other sizes. What cannot (a pooling, an
attention with a mask, a slice of tokens) reads padded tokens as before.
"""

import operator
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from tokenprune.analysis.nodes import holds_no_tensor
from tokenprune.analysis.operators import Kind, couples, kind_of
from tokenprune.ops import varlen
from tokenprune.ops.jagged import gather_table_jagged, padded_attention, take_chosen
from tokenprune.rewrite.kept.jagged import counts_of
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.tracing.effects import Store, has_effect

__all__ = ["PackRows"]

_OF_SHAPES = (Kind.FACTORY, Kind.ONES, Kind.ANY_LENGTH)


class PackRows(Pass):
    """Runs last, on a graph that holds for any number of images."""

    def apply(self, rewrite: Rewrite) -> None:
        nodes = list(rewrite.graph.nodes)
        after = nodes[nodes.index(rewrite.records[0].kept) :]
        # a twin is another tensor, in which nobody sees what is written into the first
        writes = any(has_effect(n) and not isinstance(n.target, Store) for n in after[:-1])
        if not writes and not rewrite.analysis.batch_bound:
            _Packing(rewrite).apply()


class _Packing:
    def __init__(self, rewrite: Rewrite) -> None:
        self.rw = rewrite
        self.twins: dict[fx.Node, fx.Node] = {}
        self.chosen: dict[fx.Node, int] = {}
        """Node -> stage, of all that get a twin."""
        for node in rewrite.graph.nodes:
            stage = self._stage_of_twin(node)
            if stage is not None:
                self.chosen[node] = stage
        while refused := [node for node in self.chosen if not self._stays(node)]:
            for node in refused:
                del self.chosen[node]

    def apply(self) -> None:
        """Put the twins in, and take out what nobody reads then."""
        for node, stage in self.chosen.items():
            self.twins[node] = self._twin(node, stage)
        for node, twin in self.twins.items():
            for reader in [n for n in node.users if n not in self.twins]:
                number = self._is_number(reader) and not has_effect(reader)
                pad = varlen.as_padded if number else varlen.unpack
                how = (twin, self._lengths(self.chosen[node]), self._dim(node))
                padded = self.rw.once((pad, twin), self.rw.insert_after, twin, pad, *how)
                reader.replace_input_with(node, padded)
        for node in reversed(self.twins):
            self.rw.graph.erase_node(node)
        self.rw.graph.eliminate_dead_code(has_effect)

    def _stage_of_twin(self, node: fx.Node) -> int | None:
        """The stage whose tokens a node works on one by one; None if it has no twin."""
        origin = self.rw.origin(node)
        if origin is None or node.op not in ("call_function", "call_method", "call_module"):
            return None
        several = isinstance(origin.meta["val"], tuple | list)
        stages = {self._stage(n) for n in (node.users if several else [node])}
        stage = next(iter(stages), None)
        if len(stages) != 1 or stage is None:
            return None
        if several and not all(_picks(n) for n in node.users):
            return None
        if node.target is take_chosen:
            return stage
        if node.target is padded_attention:
            return stage if self._plain_attention(node, stage) else None
        if node.target is not origin.target and node.target != origin.target:
            return None  # a pass put it in the place of something that mixes tokens
        if has_effect(node) or couples(self.rw.root, node):
            return None
        if kind_of(self.rw.root, node) in _OF_SHAPES or not _takes_slices(node):
            return None
        operands = _operands(node)
        holding = any(n in self.chosen or self._stage(n) is not None for n in operands)
        return stage if holding and all(self._readable(n, stage) for n in operands) else None

    def _stage(self, node: fx.Node) -> int | None:
        """The stage whose tokens a tensor holds, prefix and all, along one dim."""
        facts = self.rw.facts(node)
        if len(facts.dims) != 1 or facts.folded:
            return None
        (dim,) = facts.dims.values()
        return dim.stage if dim.prefix == self.rw.num_prefix else None

    def _plain_attention(self, node: fx.Node, stage: int) -> bool:
        given = node.kwargs
        plain = given["attn_mask"] is None or self._of_padded(given["attn_mask"], stage)
        if not plain or given["is_causal"] is not False:
            return False
        if given["dropout_p"] != 0 or isinstance(given["scale"], fx.Node):
            return False
        return all(
            self._stage(n) == stage
            and self._dim(n) == self.rw.rank(n) - 2
            and self._readable(n, stage)
            for n in _operands(node)
        )

    def _of_padded(self, mask: Any, stage: int) -> bool:
        """Whether a mask was gathered for the tokens of each image, [B, h, L or 1, L]."""
        if mask.target is not gather_table_jagged:
            return False
        args: tuple[Any, ...] = mask.args
        table, kept, dims, prefix, rank, rows, _ = args
        places = {d - self.rw.rank(table) for d in dims}
        if set(prefix) != {self.rw.num_prefix} or kept is not self.rw.records[stage].kept:
            return False
        return bool(rank == 4 and rows == 1 and -1 in places and places <= {-1, -2})

    def _readable(self, node: fx.Node, stage: int) -> bool:
        """Whether the packed form of a node is there, or can be made."""
        if node in self.chosen:
            return self.chosen[node] == stage
        if self._is_number(node):
            return self._has_packed_number(node, stage)
        facts = self.rw.facts(node)
        if facts.dims:
            return self._stage(node) == stage and facts.rows_per_image == 1
        origin = self.rw.origin(node)
        tensor = origin is not None and isinstance(origin.meta["val"], Tensor)
        return tensor and not (facts.batched or facts.folded)

    def _has_packed_number(self, node: fx.Node, stage: int) -> bool:
        if node.op not in ("call_function", "call_method") or has_effect(node):
            return False
        for used in node.all_input_nodes:
            facts = self.rw.facts(used)
            an_image = facts.rows_per_image == 1 and not facts.dims and not facts.folded
            if not (self._readable(used, stage) or (an_image and not self._is_number(used))):
                return False
        return True

    def _is_number(self, node: fx.Node) -> bool:
        origin = self.rw.origin(node)
        return origin is not None and holds_no_tensor(origin.meta["val"])

    def _stays(self, node: fx.Node) -> bool:
        """Whether a chosen node can have a twin, given which others do."""
        stage, facts = self.chosen[node], self.rw.facts(node)
        if not all(self._readable(n, stage) for n in _operands(node)):
            return False
        outside = [n for n in node.users if self.chosen.get(n) != stage]
        return not outside or facts.rows_per_image == 1

    def _dim(self, node: fx.Node) -> int:
        return next(iter(self.rw.facts(node).dims))

    def _lengths(self, stage: int) -> fx.Node:
        kept = self.rw.records[stage].kept
        counts = (counts_of(self.rw, stage, device=True), counts_of(self.rw, stage))
        how = (varlen.lengths_of, kept, *counts, self.rw.num_prefix)
        return self.rw.once(("lengths", stage), self.rw.insert_after, kept, *how)

    def _twin(self, node: fx.Node, stage: int) -> fx.Node:
        lengths = self._lengths(stage)
        if node.target is take_chosen:
            return self.rw.insert(node, varlen.take_packed_tokens, *node.args, lengths)
        if node.target is padded_attention:
            operands = [self._packed(n, stage, node) for n in _operands(node)]
            options = {name: node.kwargs[name] for name in ("scale", "enable_gqa")}
            options["mask"] = node.kwargs["attn_mask"]
            return self.rw.insert(node, varlen.packed_attention, *operands, lengths, **options)
        return self._copy(node, stage, node)

    def _copy(self, node: fx.Node, stage: int, before: fx.Node, for_shape: bool = False) -> fx.Node:
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda used: self._packed(used, stage, before, for_shape)
        )
        with self.rw.graph.inserting_before(before):
            copy = self.rw.graph.create_node(node.op, node.target, args, kwargs)
        copy.meta = dict(node.meta)
        return copy

    def _packed(
        self, node: fx.Node, stage: int, before: fx.Node, for_shape: bool = False
    ) -> fx.Node:
        """The packed form of what a new node reads, perhaps `for_shape` alone."""
        if node in self.twins:
            return self.twins[node]
        if self._is_number(node):
            return self.rw.once(("number", node, stage), self._copy, node, stage, before, True)
        facts = self.rw.facts(node)
        if not (facts.dims or (facts.batched and for_shape)):
            return node
        make: Any = varlen.as_packed if for_shape else varlen.pack
        how: tuple[Any, ...] = (node, self._lengths(stage))
        if facts.dims:
            how = (*how, self._dim(node))
        else:
            make = varlen.one_image
        return self.rw.once((make, node, stage), self.rw.insert, before, make, *how)


def _operands(node: fx.Node) -> list[fx.Node]:
    """What a twin reads packed; of attention not the policy, which hides padding."""
    if node.target is take_chosen:
        return []
    if node.target is padded_attention:
        return [n for n in node.args[:3] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def _picks(node: fx.Node) -> bool:
    """Whether a node is one of several tensors that another returns."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _takes_slices(node: fx.Node) -> bool:
    """Whether an indexing, if it is one, says nothing that picks tokens by a list of numbers."""
    if node.target is not operator.getitem:
        return True
    asked = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part is None or isinstance(part, int | slice | type(...)) for part in asked)
