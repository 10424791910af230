"""The norm of each token as its score."""

from typing import Any

import torch

from tokenprune.scorers.protocol import SCORERS, Mask, Scorer, Scores, Tokens, as_keep_logits

__all__ = ["TokenNorm"]


@SCORERS.register("token-norm")
class TokenNorm(Scorer):
    """Keeps the tokens with the largest L2 norm over their channels."""

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        return as_keep_logits(torch.linalg.vector_norm(tokens, dim=-1, dtype=wide))
