"""The class token's attention to each token as its score."""

from typing import Any, ClassVar

from tokenprune.ops.class_attention import class_weights
from tokenprune.recipe.names import SCORERS
from tokenprune.scorers.protocol import Mask, Need, Scores, Tokens, Weigher, as_keep_logits

__all__ = ["ClassAttention"]


@SCORERS.register("class-attention")
class ClassAttention(Weigher):
    """Keeps the tokens that the class token attends to most, averaged over the heads (EViT, Liang
    et al., 2022): its row of softmax(q k^T), formed once more, so that fused attention stays."""

    needs: ClassVar[Need] = Need.CLASS_LOGITS

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        weights = class_weights(needed["class_logits"], present, tokens.shape[1])
        return as_keep_logits(weights)
