"""Random keep-or-drop decisions with a gradient."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["sample_decision", "sample_topk", "straight_through"]


def sample_decision(
    keep_logits: Float[Tensor, "B N 2"],
    previous: Float[Tensor, "B N"],
    *,
    temperature: float = 1.0,
    hard: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B N"]:
    """Sample which tokens stay: Gumbel-softmax (Jang et al., 2017, eq. 1) times `previous`.

    Class 0 is *keep*, as in DynamicViT's code and checkpoints; the paper's text numbers the classes
    the other way round. With two classes the softmax is a sigmoid of the difference, which
    cannot overflow. Sampled in fp32 (fp64 for fp64 logits), also under autocast. NaN logits count
    as 0, so a dropped token that holds NaN stays dropped.

    Args:
        keep_logits: unnormalised log-probabilities, keep first.
        previous: decision of the stage before (ones at the first); its dropped tokens stay dropped.
        temperature: of the softmax, above 0. The hard forward value does not depend on it.
        hard: 0/1 forward with the gradient of the soft sample (straight-through).
        generator: source of the noise, on the device of `keep_logits`; None for the global one.

    Returns:
        The decision of this stage, exactly 0 or 1 when `hard` and `previous` holds 0/1.
    """
    margin = _noisy_margin(keep_logits, temperature, generator)
    return straight_through(margin, margin >= 0, hard) * previous


def sample_topk(
    keep_logits: Float[Tensor, "B N 2"],
    previous: Float[Tensor, "B N"],
    num_keep: int,
    *,
    temperature: float = 1.0,
    hard: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B N"]:
    """Sample which K tokens stay: the best of the scores with noise, times `previous`.

    The noise is that of `sample_decision`, so the K are a sample without replacement (Gumbel top-K:
    Kool et al., 2019). The soft sample, which gives the gradient, compares each token with the last
    one that stays. Where fewer than K tokens are left, all of those stay.

    Args:
        num_keep: K, from 1 to N.

    The rest is as for `sample_decision`.
    """
    margin = _noisy_margin(keep_logits, temperature, generator)
    there = previous > 0.5
    ranked = margin.detach().masked_fill(~there, float("-inf"))
    best = ranked.topk(num_keep, dim=1)
    chosen = torch.zeros_like(there).scatter(1, best.indices, True)
    last = best.values[:, -1:].nan_to_num(neginf=0.0)
    return straight_through(margin - last, chosen, hard) * previous


def _noisy_margin(
    keep_logits: Float[Tensor, "B N 2"], temperature: float, generator: torch.Generator | None
) -> Float[Tensor, "B N"]:
    """Score of keeping minus that of dropping, each with Gumbel noise, over the temperature."""
    dtype = torch.promote_types(keep_logits.dtype, torch.float32)
    limits = torch.finfo(dtype)
    # A quarter of the range each, so that the difference below stays finite.
    logits = torch.nan_to_num(
        keep_logits.to(dtype), nan=0.0, posinf=limits.max / 4, neginf=-limits.max / 4
    )
    # generator=None is another overload, which refuses torch.compile's symbolic batch size
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform = torch.rand(keep_logits.shape, device=keep_logits.device, dtype=dtype, **source)
    # rand() can return 0, and 1 - eps / 2 is the largest number below 1: both logs stay finite.
    uniform = uniform.clamp(limits.tiny, 1 - limits.eps / 2)
    noisy = logits - torch.log(-torch.log(uniform))
    return (noisy[..., 0] - noisy[..., 1]) / temperature


def straight_through(
    margin: Float[Tensor, "B N"], chosen: Bool[Tensor, "B N"], hard: bool
) -> Float[Tensor, "B N"]:
    """`chosen` as 0 and 1, with the gradient of the sigmoid of `margin`; that itself unless
    `hard`."""
    soft = torch.sigmoid(margin)
    # soft - soft.detach() is exactly 0, so the value stays exactly 0 or 1.
    return chosen.to(soft.dtype) + (soft - soft.detach()) if hard else soft
