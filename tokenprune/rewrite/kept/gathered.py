"""The gather path: dropped tokens leave, the same number of every image."""

import operator
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, fx

from tokenprune.analysis.facts import Aligned
from tokenprune.ops.moving import gather_table, put_back
from tokenprune.rewrite.kept.pruning_trace import StageTrace, number_traces
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.stages import present_gathered, select_gathered

__all__ = ["Gathered"]


class Gathered:
    """`kept` holds the original numbers [B, K] of the tokens that are left, ascending."""

    name: PathName = "gather"
    removes = True
    attention: ClassVar[None] = None

    def present(
        self, rw: Rewrite, at: fx.Node, tokens: fx.Node, previous: fx.Node | None
    ) -> fx.Node | None:
        """See `KeptSet.present`."""
        real = rw.real_patches()
        return None if real is None else rw.insert(at, present_gathered, previous, real, tokens)

    def select(
        self,
        rw: Rewrite,
        at: fx.Node,
        tokens: fx.Node,
        keep_logits: fx.Node,
        previous: fx.Node | None,
        stage: int,
    ) -> tuple[fx.Node, fx.Node]:
        """See `KeptSet.select`."""
        prefix, real = rw.num_prefix, rw.real_patches()
        chosen = rw.insert(
            at, select_gathered, tokens, keep_logits, previous, rw.settings, stage, prefix, real
        )
        left, kept = (rw.insert(at, operator.getitem, chosen, i) for i in range(2))
        return left, kept

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """See `KeptSet.policy`.

        Raises:
            RuntimeError: Always: nothing that is there is hidden, so no pass asks.
        """
        raise RuntimeError("the gather path hides no token")

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        """See `KeptSet.gather`."""
        return rw.insert(at, gather_table, table, *gather_arguments(rw, aligned))

    def put_back(
        self, rw: Rewrite, at: fx.Node, full: fx.Node, tokens: fx.Node, stage: int
    ) -> fx.Node:
        """See `KeptSet.put_back`."""
        return rw.insert(at, put_back, full, tokens, rw.records[stage].kept, rw.num_prefix)

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        """See `KeptSet.blank`; every row holds a token."""
        return tokens

    def stage_traces(
        self, records: Sequence[tuple[Tensor, Tensor]], num_patches: Sequence[int], nested: bool
    ) -> list[StageTrace]:
        """See `KeptSet.stage_traces`."""
        return number_traces(records, num_patches, nested, lambda decision, kept: kept.shape[1])


def gather_arguments(rw: Rewrite, aligned: Aligned) -> tuple[object, ...]:
    """What the gather of a table takes beside the table."""
    dims = tuple(aligned.dims)
    prefix = tuple(dim.prefix for dim in aligned.dims.values())
    kept = rw.records[next(iter(aligned.dims.values())).stage].kept
    return kept, dims, prefix, aligned.rank, aligned.rows_per_image
