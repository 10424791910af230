"""The ragged path (eval, `selection: threshold`): images keep different numbers of tokens.

The graph is that of the gather path, on rows as long as that of the image that keeps most; what is
padding in a row is hidden from all that mixes tokens, as dropped tokens are on the mask path.
`cutting.py` then cuts it at the stages.
"""

import operator

from torch import fx

from tokenprune.ops.attention import masked_attention
from tokenprune.ops.jagged import blank_padding, kept_policy, padded_attention, take_chosen
from tokenprune.rewrite.mix import Policies
from tokenprune.rewrite.rewrite import Pass, Rewrite
from tokenprune.rewrite.stages import forced_set, ragged_stage

__all__ = ["BlankPadding", "PlainAttention", "RaggedPolicies", "RaggedStages"]


class RaggedStages(Pass):
    """Put predictor and selection where each stage stands, and the removal behind them."""

    def apply(self, rewrite: Rewrite) -> None:
        prefix, numbers, real = rewrite.plan.num_prefix_tokens, None, rewrite.real_patches()
        inputs = rewrite.graph.find_nodes(op="placeholder")
        for stage in rewrite.traced.markers:
            marker = rewrite.marker(stage)
            entering = marker.all_input_nodes[0]
            rewrite.entering.append(entering)
            predictor = rewrite.predictor(marker, stage)
            # where the whole batch is still together
            forced = rewrite.insert_after(inputs[-1], forced_set, rewrite.context, stage)
            result = rewrite.insert(
                marker,
                ragged_stage,
                predictor,
                entering,
                numbers,
                rewrite.context,
                stage,
                prefix,
                real,
                forced,
            )
            chosen, numbers, logits = (
                rewrite.insert(marker, operator.getitem, result, i) for i in range(3)
            )
            tokens = rewrite.insert(marker, take_chosen, entering, chosen, prefix)
            marker.replace_all_uses_with(tokens)
            rewrite.replaced(marker, tokens)
            rewrite.graph.erase_node(marker)
            rewrite.records.append((logits, numbers))


class RaggedPolicies(Policies):
    """Which rows hold a token: all, or the policy that says so."""

    def _make(self, stage: int, prefix: int, fold: int) -> fx.Node:
        numbers = self._rewrite.records[stage][1]
        return self._rewrite.insert_after(numbers, kept_policy, numbers, prefix, fold)


class PlainAttention(Pass):
    """Padding holds nothing harmful, so attention needs a mask and no more."""

    def apply(self, rewrite: Rewrite) -> None:
        for node in rewrite.graph.find_nodes(op="call_function", target=masked_attention):
            node.target = padded_attention


class BlankPadding(Pass):
    """Rows of an output that hold no token are 0 (`restore=False`)."""

    def apply(self, rewrite: Rewrite) -> None:
        site = rewrite.output_site()
        for _, node in rewrite.token_outputs():
            if rewrite.fold(node) != 1:
                continue
            for user in [u for u in node.users if u is site or isinstance(u.target, type)]:
                blank = node
                for d, dim in rewrite.dims(node).items():
                    numbers = rewrite.records[dim.stage][1]
                    blank = rewrite.insert(user, blank_padding, blank, numbers, dim.prefix, d)
                user.replace_input_with(node, blank)
