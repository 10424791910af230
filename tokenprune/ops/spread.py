"""Decisions with noise that is no chance: the same in every call, and spread over the tokens.

Decisions of a predictor that has learned little are noise in training, since Gumbel noise is larger
than the differences between its scores; a top-K without noise follows those differences alone, and
then drops whole parts of an image. With noise of the same distribution, whose values are spread
evenly over the tokens of an image, training and eval rank the tokens alike.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenprune.ops.gumbel import straight_through
from tokenprune.ops.selection import TIES, tie_order

__all__ = ["spread_decision", "with_spread_noise"]


def with_spread_noise(
    keep_logits: Float[Tensor, "B N 2"], numbers: Int[Tensor, "B N"] | None = None
) -> Float[Tensor, "B N 2"]:
    """Keep log-probabilities with noise added to the margin between keeping and dropping.

    The noise of token n is the logistic quantile at its place in `tie_order`; a difference of two
    Gumbel variables is logistic too.

    Args:
        keep_logits: log-probabilities, keep first.
        numbers: original numbers of the tokens, -1 for padding; None if token i is number i.
    """
    if numbers is None:
        numbers = torch.arange(keep_logits.shape[1], device=keep_logits.device).unsqueeze(0)
    share = (tie_order(numbers.clamp_min(0)).to(keep_logits.dtype) + 0.5) / TIES
    noise = torch.log(share) - torch.log(1 - share)
    margin = keep_logits[..., 0] - keep_logits[..., 1] + noise
    return torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], dim=-1)


def spread_decision(
    keep_logits: Float[Tensor, "B N 2"],
    previous: Float[Tensor, "B N"],
    chosen: Bool[Tensor, "B N"] | None = None,
    *,
    temperature: float = 1.0,
    hard: bool = True,
) -> Float[Tensor, "B N"]:
    """As `sample_decision` and `sample_topk`, with spread noise; the gradient is theirs.

    Args:
        keep_logits: log-probabilities without noise, of all N tokens.
        previous: decision of the stage before; its dropped tokens stay dropped.
        chosen: what eval keeps, the best K or those above a threshold; None keeps each token whose
            noisy margin is positive.
        temperature: of the sigmoid that gives the gradient.
        hard: 0/1 forward with the gradient of the soft decision (straight-through).
    """
    noisy = with_spread_noise(torch.nan_to_num(keep_logits, nan=0.0))
    margin = (noisy[..., 0] - noisy[..., 1]) / temperature
    if chosen is None:
        chosen = margin >= 0
    else:
        last = margin.detach().masked_fill(~chosen, float("inf")).amin(1, keepdim=True)
        margin = margin - last.nan_to_num(posinf=0.0)
    return straight_through(margin, chosen, hard) * previous
