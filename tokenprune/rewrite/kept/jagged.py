"""The gather path where images keep different numbers of tokens (`selection: threshold`).

Rows are as long as those of the image that keeps most; what is padding in a row is hidden from all
that mixes tokens, as dropped tokens are on the mask path.
"""

import operator
from collections.abc import Sequence

from torch import Tensor, fx

from tokenprune.analysis.facts import Aligned
from tokenprune.ops.jagged import (
    blank_padding,
    gather_table_jagged,
    kept_policy,
    padded_attention,
    put_back_jagged,
    take_chosen,
)
from tokenprune.rewrite.kept.gathered import gather_arguments
from tokenprune.rewrite.kept.pruning_trace import StageTrace, number_traces
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.stages import forced_set, present_jagged, select_jagged

__all__ = ["Jagged"]


class Jagged:
    """`kept` holds original numbers [B, K], then -1 where an image has fewer tokens than K."""

    name: PathName = "jagged"
    removes = True
    attention = staticmethod(padded_attention)

    def present(
        self, rw: Rewrite, at: fx.Node, tokens: fx.Node, previous: fx.Node | None
    ) -> fx.Node | None:
        """See `KeptSet.present`."""
        real = rw.real_patches()
        if previous is None and real is None:
            return None
        return rw.insert(at, present_jagged, previous, real, tokens)

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
        last_input = rw.graph.find_nodes(op="placeholder")[-1]
        # where the whole batch is still together
        forced = rw.insert_after(last_input, forced_set, rw.settings, stage)
        real = rw.real_patches()
        chosen = rw.insert(
            at, select_jagged, keep_logits, previous, rw.settings, stage, real, forced
        )
        places, numbers = (rw.insert(at, operator.getitem, chosen, i) for i in range(2))
        return rw.insert(at, take_chosen, tokens, places, rw.num_prefix), numbers

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """See `KeptSet.policy`; its value is None where no row of the batch has padding."""
        numbers = rw.records[stage].kept
        return rw.once(
            ("policy", stage, prefix, rows_per_image),
            lambda: rw.insert_after(numbers, kept_policy, numbers, prefix, rows_per_image),
        )

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        """See `KeptSet.gather`."""
        return rw.insert(at, gather_table_jagged, table, *gather_arguments(rw, aligned))

    def put_back(
        self, rw: Rewrite, at: fx.Node, full: fx.Node, tokens: fx.Node, stage: int
    ) -> fx.Node:
        """See `KeptSet.put_back`."""
        return rw.insert(at, put_back_jagged, full, tokens, rw.records[stage].kept, rw.num_prefix)

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        """See `KeptSet.blank`."""
        for d, dim in rw.facts(tokens).dims.items():
            kept = rw.records[dim.stage].kept
            tokens = rw.insert(at, blank_padding, tokens, kept, dim.prefix, d)
        return tokens

    def stage_traces(
        self, records: Sequence[tuple[Tensor, Tensor]], num_patches: Sequence[int], nested: bool
    ) -> list[StageTrace]:
        """See `KeptSet.stage_traces`."""
        return number_traces(
            records, num_patches, nested, lambda decision, kept: decision.sum(dim=1).mean()
        )
