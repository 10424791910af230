"""Tensors that were made for all tokens: RoPE tables, position biases, masks, and their sizes."""

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Size, fx
from torch.fx.node import map_arg

from tokenprune.ops.moving import length_after
from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.modes import MODES

__all__ = ["GatherAligned", "KeepTablesWhole", "ResizeTables"]

RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "method normal")


class KeepTablesWhole(Pass):
    """A tensor that takes only its size from the tokens is made for all of them.

    Its sizes are written in as they were traced; the signature a trace is kept under fixes them.
    """

    def apply(self, rewrite: Rewrite) -> None:
        for table in rewrite.nodes():
            if rewrite.facts(table).whole_table:
                whole = partial(_traced_size, rewrite, table)
                table.args, table.kwargs = map_arg((table.args, table.kwargs), whole)


def _traced_size(rewrite: Rewrite, at: fx.Node, used: fx.Node) -> Any:
    """A size as it was traced, if it follows the tokens."""
    value = used.meta["val"]
    if not rewrite.facts(used).follows_tokens:
        return used
    if not isinstance(value, Size):
        return value
    # only the batch may differ from the trace; it is dim 0 of every tensor that is worth a table
    return (rewrite.insert(at, operator.getitem, used, 0), *value[1:])


@dataclass
class ResizeTables(Pass):
    """Where a host reads the length of an aligned table, give it the gathered length."""

    kept: KeptSet

    def apply(self, rewrite: Rewrite) -> None:
        for node in rewrite.nodes():
            dims = rewrite.facts(node).length_of
            if dims:
                kept = self.kept.numbers(rewrite, max(dim.stage for dim in dims.values()))
                along = tuple((d, dim.prefix) for d, dim in dims.items())
                rewrite.map_output(node, length_after, kept, along)


@dataclass
class GatherAligned(Pass):
    """Gather RoPE tables, position biases and masks along their token dims, once per stage each."""

    kept: KeptSet

    def apply(self, rewrite: Rewrite) -> None:
        numbers: dict[Any, int] = {}
        for consumer, source, aligned in rewrite.alignments():
            dims = tuple(aligned.dims.items())
            how, modes = (aligned.rank, aligned.rows_per_image), consumer.meta.get(MODES, ())
            key = ("aligned", _number(source, numbers), dims, *how, modes)
            gathered = rewrite.once(key, self.kept.gather, rewrite, consumer, source, aligned)
            consumer.replace_input_with(source, gathered)

    def ensures(self, rewrite: Rewrite) -> None:
        for consumer, source, _ in rewrite.alignments():
            if source in consumer.all_input_nodes:
                raise RuntimeError(f"{rewrite.where(consumer)} still reads {source.name} whole")


def _number(node: fx.Node, known: dict[Any, int]) -> int:
    """A number that nodes of the same value share, so that blocks that each split the same RoPE
    table get one gather. Random and stateful nodes share theirs with no other."""
    if node not in known:
        called = node.op in ("call_function", "call_method") and not has_effect(node)
        pure = called and not any(word in str(node.target) for word in RANDOM)
        made_of = map_arg((node.args, dict(node.kwargs)), lambda used: f"%{_number(used, known)}")
        key = (node.op, node.target, str(made_of)) if pure or node.op == "get_attr" else node
        known[node] = known.setdefault(key, len(known))
    return known[node]
