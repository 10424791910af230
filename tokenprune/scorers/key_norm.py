"""The norm of each token's attention keys as its score."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokenprune.recipe.names import SCORERS
from tokenprune.scorers.protocol import Mask, Need, Scorer, Scores, Tokens, as_keep_logits

__all__ = ["KeyNorm"]


@SCORERS.register("key-norm")
class KeyNorm(Scorer):
    """Keeps the tokens whose keys are small: their L2 norm, averaged over the heads.

    At an entry these are the keys of the block before, so the first stage can't be at block 0.
    """

    needs: ClassVar[Need] = Need.KEYS

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        keys: Float[Tensor, "B H N d"] = needed["keys"]
        wide = torch.promote_types(keys.dtype, torch.float32)
        return as_keep_logits(-torch.linalg.vector_norm(keys, dim=-1, dtype=wide).mean(1))
