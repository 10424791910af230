"""One token made of those that leave (EViT, Liang et al., 2022, section 3.3)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["fuse"]


def fuse(
    tokens: Float[Tensor, "B N D"],
    weights: Float[Tensor, "B N"],
    kept: Bool[Tensor, "B N"],
    present: Bool[Tensor, "B N"] | None,
) -> tuple[Float[Tensor, "B D"], Int[Tensor, "B 1"]]:
    """The weighted sum of the tokens that leave and of the kept one that has the least weight, in
    whose place it stands. As in EViT weights are not normalised. Where no token leaves, that one
    itself.

    Args:
        tokens: patch tokens; those that are not present may hold anything.
        weights: 0 or more.
        kept: the tokens that stay.
        present: False for tokens that an earlier stage dropped and for padding; None if all are
            there.

    Returns:
        The fused token, and its place among the N.
    """
    standing, leaving = kept, ~kept
    if present is not None:
        standing, leaving = kept & present, leaving & present
        tokens = torch.where(present.unsqueeze(-1), tokens, 0)
    place = weights.masked_fill(~standing, float("inf")).argmin(1, keepdim=True)
    at_place = place == torch.arange(tokens.shape[1], device=tokens.device)
    shares = weights.masked_fill(~(leaving | at_place), 0).to(tokens.dtype)
    fused = (shares.unsqueeze(1) @ tokens).squeeze(1)
    own = tokens.gather(1, place.unsqueeze(-1).expand(-1, -1, tokens.shape[2])).squeeze(1)
    return torch.where(leaving.any(1, keepdim=True), fused, own), place
