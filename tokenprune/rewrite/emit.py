"""The last pass: what the rewritten graph returns, and no dead node left in it."""

import operator

from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.bypass import Layout, flat_tokens
from tokenprune.rewrite.rewrite import Pass, Rewrite
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.tracer import enter_block

__all__ = ["Emit"]


class Emit(Pass):
    """Return (host output, stage records, patch tokens, which patches are real).

    Args:
        final: Path of the module whose output holds the final tokens.
        channels_first: A grid of tokens is [B, D, H, W] in this host.
        tokens_allowed: The output may hold tokens: none leave, or the caller said what to do.
    """

    def __init__(self, final: str, channels_first: bool, tokens_allowed: bool) -> None:
        self.final, self.channels_first = final, channels_first
        self.tokens_allowed = tokens_allowed

    def requires(self, rewrite: Rewrite) -> None:
        if self.tokens_allowed:
            return
        holding = [field for field, _ in rewrite.token_outputs()]
        if holding:
            raise UnsupportedHostError(
                f"The output {', '.join(holding)} holds tokens after a stage, whose number changes "
                "when they are pruned. Say what you want: wrap(..., restore=True) gives every "
                "token back in place, dropped ones with their last value; restore=False leaves "
                "only the kept ones. Or ask for an output without tokens (a model with a head, "
                "output_hidden_states=False), or use model.using('dense')."
            )

    def apply(self, rewrite: Rewrite) -> None:
        final = rewrite.copy_of(rewrite.traced.module_outputs[self.final])
        if rewrite.plan.mode == "bypass":
            tokens = rewrite.insert_after(final, flat_tokens, final, self._layout(rewrite))
        else:
            tokens = final
        if rewrite.plan.num_prefix_tokens:
            patches = (slice(None), slice(rewrite.plan.num_prefix_tokens, None))
            tokens = rewrite.insert_after(tokens, operator.getitem, tokens, patches)
        found = (tuple(rewrite.records), tokens, rewrite.real_patches())
        rewrite.output.args = ((rewrite.output.args[0], *found),)
        for node in list(rewrite.graph.nodes):
            if node.target is enter_block:
                node.replace_all_uses_with(node.args[0])
        rewrite.graph.eliminate_dead_code(has_effect)

    def _layout(self, rewrite: Rewrite) -> Layout:
        """As the tokens of the last stage lie, if it is a grid too."""
        shape = rewrite.traced.module_outputs[self.final].meta["val"].shape
        fold = max(shape[0] // rewrite.traced.batch_size, 1)
        return Layout(fold, self.channels_first and len(shape) == 4)

    def ensures(self, rewrite: Rewrite) -> None:
        if any(node.target is enter_block for node in rewrite.graph.nodes):
            raise RuntimeError("a block marker was left in the graph")
