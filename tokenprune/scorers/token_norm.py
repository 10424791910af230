"""The norm of each token as its score."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokenprune.scorers.protocol import SCORERS, Scorer, as_keep_logits

__all__ = ["TokenNorm"]


@SCORERS.register("token-norm")
class TokenNorm(Scorer):
    """Keeps the tokens with the largest L2 norm over their channels."""

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        present: Float[Tensor, "B N"] | None = None,
        **needed: Any,
    ) -> Float[Tensor, "B N 2"]:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return as_keep_logits(torch.linalg.vector_norm(tokens, dim=-1, dtype=wide))
