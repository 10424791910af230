"""The gather path where images keep different numbers of tokens (`selection: threshold`).

Rows are as long as those of the image that keeps most; what is padding in a row is hidden from all
that mixes tokens, as dropped tokens are on the mask path.
"""

from torch import fx

from tokenprune.ops import jagged
from tokenprune.rewrite.kept.protocol import Selecting, StagePoint
from tokenprune.rewrite.kept.token_ops import MASKED
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.stages import forced_set, present_jagged, select_jagged

__all__ = ["Jagged"]


class Jagged(Selecting):
    """`kept` holds original numbers [B, K], then -1 where an image has fewer tokens than K."""

    name = "jagged"
    seen = staticmethod(present_jagged)
    ops = MASKED._replace(attention=jagged.padded_attention)
    table_gather = staticmethod(jagged.gather_table_jagged)
    restore = staticmethod(jagged.put_back_jagged)

    def select(self, rw: Rewrite, stage: StagePoint, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
        last_input = rw.graph.find_nodes(op="placeholder")[-1]
        # where the whole batch is still together
        forced = rw.insert_after(last_input, forced_set, rw.settings, stage.number)
        how = (stage.previous, rw.settings, stage.number, rw.real_patches(), forced)
        chosen = rw.insert(stage.at, select_jagged, logits, *how)
        places, numbers = (rw.item(stage.at, chosen, place) for place in range(2))
        return rw.insert(stage.at, jagged.take_chosen, stage.tokens, places, rw.num_prefix), numbers

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """None where no row of the batch has padding."""
        numbers, key = rw.records[stage].kept, ("policy", stage, prefix, rows_per_image)
        policy = (jagged.kept_policy, numbers, prefix, rows_per_image)
        return rw.once(key, rw.insert_after, numbers, *policy)

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        for d, dim in rw.facts(tokens).dims.items():
            kept = rw.records[dim.stage].kept
            tokens = rw.insert(at, jagged.blank_padding, tokens, kept, dim.prefix, d)
        return tokens
