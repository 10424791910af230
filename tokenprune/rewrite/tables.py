"""The gather path (eval): dropped tokens leave, and with them their rows of what is aligned."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Size, Tensor, fx
from torch.fx.node import map_arg

from tokenprune.ops.selection import gather_aligned
from tokenprune.rewrite.rewrite import Pass, Rewrite
from tokenprune.rewrite.stages import gather_stage

__all__ = ["GatherAligned", "GatherStages", "KeepTablesWhole", "ResizeTables", "length_after"]


class KeepTablesWhole(Pass):
    """A tensor that takes only its size from the tokens is made for all of them.

    Its sizes are written in as they were traced; the signature a trace is kept under fixes them.
    """

    def apply(self, rewrite: Rewrite) -> None:
        for table in rewrite.axes.tables:
            node = rewrite.copy_of(table)
            sizes = {
                rewrite.copy_of(n): n for n in table.all_input_nodes if n in rewrite.axes.sizes
            }

            def whole(
                used: fx.Node, sizes: dict[fx.Node, fx.Node] = sizes, at: fx.Node = node
            ) -> Any:
                return _traced_size(rewrite, at, used, sizes[used]) if used in sizes else used

            node.args = map_arg(node.args, whole)
            node.kwargs = map_arg(node.kwargs, whole)


def _traced_size(rewrite: Rewrite, at: fx.Node, used: fx.Node, origin: fx.Node) -> Any:
    value = origin.meta["val"]
    if not isinstance(value, Size):
        return value
    # only the batch may differ from the trace; it is dim 0 of every tensor that is worth a table
    return (rewrite.insert(at, operator.getitem, used, 0), *value[1:])


class GatherStages(Pass):
    """Put predictor, selection and gather where each stage stands."""

    def apply(self, rewrite: Rewrite) -> None:
        prefix, kept, real = rewrite.plan.num_prefix_tokens, None, rewrite.real_patches()
        for stage in rewrite.traced.markers:
            marker = rewrite.marker(stage)
            rewrite.entering.append(marker.all_input_nodes[0])
            predictor = rewrite.predictor(marker, stage)
            result = rewrite.insert(
                marker,
                gather_stage,
                predictor,
                marker.args[0],
                kept,
                rewrite.context,
                stage,
                prefix,
                real,
            )
            tokens, kept, logits = (
                rewrite.insert(marker, operator.getitem, result, i) for i in range(3)
            )
            marker.replace_all_uses_with(tokens)
            rewrite.replaced(marker, tokens)
            rewrite.graph.erase_node(marker)
            rewrite.records.append((logits, kept))


def length_after(shape: Size, kept: Any, dims: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """The shape of a table once it is gathered: prefix + K along each (dim, prefix) of `dims`."""
    along = {dim: prefix + kept.shape[1] for dim, prefix in dims}
    return tuple(along.get(dim, n) for dim, n in enumerate(shape))


class ResizeTables(Pass):
    """Where a host reads the length of an aligned table, it means that of the gathered one."""

    def apply(self, rewrite: Rewrite) -> None:
        for size, dims in rewrite.axes.table_sizes.items():
            node = rewrite.copy_of(size)
            kept = rewrite.records[max(dim.stage for dim in dims.values())][1]
            along = tuple((d, dim.prefix) for d, dim in dims.items())
            readers = list(node.users)
            new = rewrite.insert_after(node, length_after, node, kept, along)
            for reader in readers:
                reader.replace_input_with(node, new)


def gather_table(
    table: Tensor,
    kept: Tensor,
    dims: tuple[int, ...],
    prefix: tuple[int, ...],
    rank: int,
    fold: int = 1,
) -> Tensor:
    """`gather_aligned`; the table itself if every token is kept, so that nothing changes at all.

    Args:
        fold: Rows of the result for each image.
    """
    if all(table.shape[d] == p + kept.shape[1] for d, p in zip(dims, prefix, strict=True)):
        return table
    kept = kept if fold == 1 else kept.repeat_interleave(fold, 0)
    return gather_aligned(table, kept, dims, prefix, rank)


class GatherAligned(Pass):
    """Gather RoPE tables, position biases and masks along their token dims, once per stage each.

    Args:
        gather: `gather_table`, or its like for what the stages recorded.
    """

    def __init__(self, gather: Callable[..., Tensor] = gather_table) -> None:
        self.gather = gather

    def apply(self, rewrite: Rewrite) -> None:
        done: dict[Any, fx.Node] = {}
        values = _Values()
        for consumer, source, aligned in rewrite.alignments():
            dims = tuple(aligned.dims)
            prefix = tuple(dim.prefix for dim in aligned.dims.values())
            kept = rewrite.records[next(iter(aligned.dims.values())).stage][1]
            key = (values(source), kept, dims, prefix, aligned.rank, aligned.fold)
            if key not in done:
                done[key] = rewrite.insert(
                    consumer,
                    self.gather,
                    source,
                    kept,
                    dims,
                    prefix,
                    aligned.rank,
                    aligned.fold,
                )
            consumer.replace_input_with(source, done[key])

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
