"""The last pass: what the rewritten graph returns, and no dead node left in it."""

import operator
from dataclasses import dataclass

from tokenprune.analysis.blocks import site_marker
from tokenprune.errors import TokensReturnedError
from tokenprune.ops.layout import Layout, flat_tokens
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.tracing.effects import has_effect

__all__ = ["Emit"]


@dataclass
class Emit(Pass):
    """Return (host output, stage records, patch tokens, which patches are real).

    Attributes:
        tokens_allowed: The output may hold tokens: none leave, or the caller said what to do.
        layout: Of the final tokens, if they are not [B, L, D].
    """

    tokens_allowed: bool
    layout: Layout | None = None

    def requires(self, rewrite: Rewrite) -> None:
        if self.tokens_allowed:
            return
        holding = [field for field, _ in rewrite.token_outputs()]
        if holding:
            named = ", ".join(field for field in holding if field != "output")
            which = f"output {named}" if named else "output"  # a tensor alone has no name
            raise TokensReturnedError(
                f"The {which} holds tokens after a stage, whose number changes "
                "when they are pruned. Say what you want: wrap(..., restore=True) gives every "
                "token back in place, dropped ones with their last value, merged ones with that of "
                "their group; restore=False leaves only the kept ones. Or ask for an output "
                "without tokens (a model with a head, output_hidden_states=False), or use "
                "model.using('dense')."
            )

    def apply(self, rewrite: Rewrite) -> None:
        tokens = final = rewrite.copy_of(rewrite.analysis.final)
        if self.layout is not None:
            tokens = rewrite.insert_after(final, flat_tokens, final, self.layout)
        if rewrite.num_prefix:
            patches = (slice(None), slice(rewrite.num_prefix, None))
            tokens = rewrite.insert_after(tokens, operator.getitem, tokens, patches)
        records = tuple((record.keep_logits, record.kept) for record in rewrite.records)
        rewrite.output.args = ((rewrite.output.args[0], records, tokens, rewrite.real_patches()),)
        for node in rewrite.nodes():
            if node.target is site_marker:
                rewrite.dissolve(node)
        rewrite.graph.eliminate_dead_code(has_effect)

    def ensures(self, rewrite: Rewrite) -> None:
        if any(node.target is site_marker for node in rewrite.graph.nodes):
            raise RuntimeError("a site marker was left in the graph")
