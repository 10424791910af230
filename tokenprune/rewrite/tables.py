"""Tensors that were made for all tokens: RoPE tables, position biases, masks, and their sizes."""

import operator
from functools import partial
from typing import Any

from torch import Size, fx
from torch.fx.node import map_arg

from tokenprune.ops.moving import length_after
from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite

__all__ = ["GatherAligned", "KeepTablesWhole", "ResizeTables"]


class KeepTablesWhole(Pass):
    """A tensor that takes only its size from the tokens is made for all of them.

    Its sizes are written in as they were traced; the signature a trace is kept under fixes them.
    """

    def apply(self, rewrite: Rewrite) -> None:
        for table in [node for node in rewrite.nodes() if rewrite.facts(node).whole_table]:

            def whole(used: fx.Node, table: fx.Node = table) -> Any:
                follows = rewrite.facts(used).follows_tokens
                return _traced_size(rewrite, table, used) if follows else used

            table.args = map_arg(table.args, whole)
            table.kwargs = map_arg(table.kwargs, whole)


def _traced_size(rewrite: Rewrite, at: fx.Node, used: fx.Node) -> Any:
    value = used.meta["val"]
    if not isinstance(value, Size):
        return value
    # only the batch may differ from the trace; it is dim 0 of every tensor that is worth a table
    return (rewrite.insert(at, operator.getitem, used, 0), *value[1:])


class ResizeTables(Pass):
    """Where a host reads the length of an aligned table, it means that of the gathered one."""

    def apply(self, rewrite: Rewrite) -> None:
        for node in rewrite.nodes():
            dims = rewrite.facts(node).length_of
            if dims:
                kept = rewrite.records[max(dim.stage for dim in dims.values())].kept
                along = tuple((d, dim.prefix) for d, dim in dims.items())
                readers = list(node.users)
                new = rewrite.insert_after(node, length_after, node, kept, along)
                for reader in readers:
                    reader.replace_input_with(node, new)


class GatherAligned(Pass):
    """Gather RoPE tables, position biases and masks along their token dims, once per stage each.

    Args:
        kept: The kept set of the path.
    """

    def __init__(self, kept: KeptSet) -> None:
        self.kept = kept

    def apply(self, rewrite: Rewrite) -> None:
        values = _Values()
        for consumer, source, aligned in rewrite.alignments():
            dims = tuple(aligned.dims.items())
            key = ("aligned", values(source), dims, aligned.rank, aligned.rows_per_image)
            make = partial(self.kept.gather, rewrite, consumer, source, aligned)
            gathered = rewrite.once(key, make)
            consumer.replace_input_with(source, gathered)

    def ensures(self, rewrite: Rewrite) -> None:
        for consumer, source, _ in rewrite.alignments():
            if source in consumer.all_input_nodes:
                raise RuntimeError(f"{rewrite.where(consumer)} still reads {source.name} whole")


class _Values:
    """Numbers nodes so that two that hold the same value share one: blocks that each split the same
    RoPE table get one gather. Random and stateful nodes only equal themselves."""

    def __init__(self) -> None:
        self._of_node: dict[fx.Node, int] = {}
        self._of_call: dict[Any, int] = {}

    def __call__(self, node: fx.Node) -> int:
        if node not in self._of_node:
            pure = node.op == "get_attr" or (
                node.op in ("call_function", "call_method") and "dropout" not in str(node.target)
            )
            arguments = str(map_arg((node.args, dict(node.kwargs)), self))
            key = (node.op, node.target, arguments) if pure else node
            self._of_node[node] = self._of_call.setdefault(key, len(self._of_call))
        return self._of_node[node]
