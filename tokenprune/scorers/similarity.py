"""How similar each token is to another one, which can stand for both."""

from typing import Any, ClassVar

from jaxtyping import Bool
from torch import Tensor

from tokenprune.ops.matching import Groups, Pairs, bipartite
from tokenprune.recipe.names import SCORERS
from tokenprune.scorers.protocol import Mask, Matcher, Need, Scores, Tokens, as_keep_logits

__all__ = ["Similarity"]


@SCORERS.register("similarity")
class Similarity(Matcher):
    """ToMe's (Bolya et al., 2023): the cosine of a token's keys, averaged over the heads, with
    those of its best partner, for every second token. The others always stay."""

    needs: ClassVar[Need] = Need.KEYS

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        real = None if present is None else present > 0
        return as_keep_logits(
            self.match(tokens, real, 0, max(tokens.shape[1] - 1, 1), **needed).score
        )

    def match(
        self,
        tokens: Tokens,
        real: Bool[Tensor, "B N"] | None,
        first: int,
        num_keep: int,
        **needed: Any,
    ) -> Groups | Pairs:
        return bipartite(needed["keys"].mean(1), real, first, num_keep)
