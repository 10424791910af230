"""The gather path where images keep different numbers of tokens (`selection: threshold`).

Rows are as long as those of the image that keeps most; what is padding in a row is hidden from all
that mixes tokens, as dropped tokens are on the mask path.
"""

from torch import fx

from tokenprune.analysis.facts import Aligned
from tokenprune.ops import jagged
from tokenprune.rewrite.kept.protocol import Selecting, StagePoint
from tokenprune.rewrite.kept.token_ops import MASKED
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.stages import forced_set, present_jagged, select_jagged

__all__ = ["Jagged", "counts_of"]


def counts_of(rw: Rewrite, stage: int, device: bool = False) -> fx.Node:
    """The node that says how many tokens each image keeps at a stage: to Python, or [B]."""
    (chosen,) = rw.records[stage].kept.all_input_nodes
    return _count(rw, chosen, device)


def _count(rw: Rewrite, chosen: fx.Node, device: bool = False) -> fx.Node:
    made = [node for node in chosen.users if node.args[1] == int(device)]
    return made[0] if made else rw.item(chosen.next, chosen, int(device))


class Jagged(Selecting):
    """`kept` holds original numbers [B, K], then -1 where an image has fewer tokens than K;
    `counts_of` says how many each image has, nothing where all have K."""

    name = "jagged"
    ops = MASKED._replace(attention=jagged.padded_attention)
    table_gather = staticmethod(jagged.gather_table_jagged)
    restore = staticmethod(jagged.put_back_jagged)

    def present(self, rw: Rewrite, stage: StagePoint) -> fx.Node | None:
        """None also where no row has padding."""
        real = rw.real_patches()
        if stage.previous is None and real is None:
            return None
        how = (stage.previous, self._counts_before(rw, stage), real, stage.tokens)
        return rw.insert(stage.at, present_jagged, *how)

    def _counts_before(self, rw: Rewrite, stage: StagePoint) -> fx.Node | None:
        return None if stage.previous is None else counts_of(rw, stage.number - 1)

    def select(self, rw: Rewrite, stage: StagePoint, logits: fx.Node) -> tuple[fx.Node, fx.Node]:
        last_input = rw.graph.find_nodes(op="placeholder")[-1]
        # where the whole batch is still together
        forced = rw.insert_after(last_input, forced_set, rw.settings, stage.number)
        before = (stage.previous, self._counts_before(rw, stage))
        how = (*before, rw.settings, stage.number, rw.real_patches(), forced)
        chosen = rw.insert(stage.at, select_jagged, logits, *how)
        places, numbers = (rw.item(stage.at, chosen, place) for place in (2, 3))
        taken = (stage.tokens, places, _count(rw, chosen), rw.num_prefix)
        return rw.insert(stage.at, jagged.take_chosen, *taken), numbers

    def policy(self, rw: Rewrite, stage: int, prefix: int, rows_per_image: int) -> fx.Node:
        """None where no row of the batch has padding."""
        numbers, key = rw.records[stage].kept, ("policy", stage, prefix, rows_per_image)
        policy = (jagged.kept_policy, numbers, counts_of(rw, stage), prefix, rows_per_image)
        return rw.once(key, rw.insert_after, numbers, *policy)

    def gather(self, rw: Rewrite, at: fx.Node, table: fx.Node, aligned: Aligned) -> fx.Node:
        gathered = super().gather(rw, at, table, aligned)
        stage = next(iter(aligned.dims.values())).stage
        gathered.args = (*gathered.args, counts_of(rw, stage))
        return gathered

    def put_back(
        self, rw: Rewrite, at: fx.Node, full: fx.Node, tokens: fx.Node, stage: int
    ) -> fx.Node:
        whole = super().put_back(rw, at, full, tokens, stage)
        whole.args = (*whole.args, counts_of(rw, stage))
        return whole

    def blank(self, rw: Rewrite, at: fx.Node, tokens: fx.Node) -> fx.Node:
        for d, dim in rw.facts(tokens).dims.items():
            kept = rw.records[dim.stage].kept
            tokens = rw.insert(at, jagged.blank_padding, tokens, kept, dim.prefix, d)
        return tokens
