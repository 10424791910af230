"""A scorer without parameters. Its entry point gives it the name `contrast`."""

from typing import Any

import torch

from tokenprune.scorers import Scorer, as_keep_logits

__all__ = ["Contrast"]


class Contrast(Scorer):
    """Keeps the tokens that differ most from the mean of all tokens."""

    def forward(
        self, tokens: torch.Tensor, present: torch.Tensor | None = None, **needed: Any
    ) -> torch.Tensor:
        """Scores [B, N, 2] of tokens [B, N, D]; `present` is 0 for tokens that are gone."""
        weight = torch.ones_like(tokens[..., 0]) if present is None else present.to(tokens.dtype)
        weight = weight.unsqueeze(-1)
        mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
        return as_keep_logits((tokens - mean).square().mean(-1))
