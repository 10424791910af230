"""The gather path where images keep different numbers of tokens (`selection: threshold`).

Rows are as long as those of the image that keeps most; what is padding in a row is hidden from all
that mixes tokens, as dropped tokens are on the mask path.
"""

import operator

from torch import Tensor, fx

from tokenprune.ops.jagged import (
    blank_padding,
    gather_table_jagged,
    kept_policy,
    padded_attention,
    put_back_jagged,
    take_chosen,
)
from tokenprune.rewrite.kept.protocol import KeptSet, StagePoint
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.stages import forced_set, present_jagged, select_jagged

__all__ = ["Jagged"]


class Jagged(KeptSet):
    """`kept` holds original numbers [B, K], then -1 where an image has fewer tokens than K."""

    name = "jagged"
    attention = staticmethod(padded_attention)
    table_gather = staticmethod(gather_table_jagged)
    restore = staticmethod(put_back_jagged)

    def present(self, rw: Rewrite, stage: StagePoint) -> fx.Node | None:
        real = rw.real_patches()
        if stage.previous is None and real is None:
            return None
        return rw.insert(stage.at, present_jagged, stage.previous, real, stage.tokens)

    def select(
        self, rw: Rewrite, stage: StagePoint, keep_logits: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        last_input = rw.graph.find_nodes(op="placeholder")[-1]
        # where the whole batch is still together
        forced = rw.insert_after(last_input, forced_set, rw.settings, stage.number)
        how = (stage.previous, rw.settings, stage.number, rw.real_patches(), forced)
        chosen = rw.insert(stage.at, select_jagged, keep_logits, *how)
        places, numbers = (rw.insert(stage.at, operator.getitem, chosen, i) for i in range(2))
        return rw.insert(stage.at, take_chosen, stage.tokens, places, rw.num_prefix), numbers

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """None where no row of the batch has padding."""
        numbers = rw.records[stage].kept
        return rw.once(
            ("policy", stage, prefix, rows_per_image),
            lambda: rw.insert_after(numbers, kept_policy, numbers, prefix, rows_per_image),
        )

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        for d, dim in rw.facts(tokens).dims.items():
            kept = rw.records[dim.stage].kept
            tokens = rw.insert(at, blank_padding, tokens, kept, dim.prefix, d)
        return tokens

    def count(self, decision: Tensor, kept: Tensor) -> Tensor:
        return decision.sum(dim=1).mean()
