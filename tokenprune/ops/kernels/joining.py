"""Who joins whom, and the means of groups: two operators, one kernel each."""

import torch
from torch import Tensor

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = ["can_join", "join_pairs", "join_tokens"]

_LARGEST = 16384  # tokens of an image that one program holds


def can_join(x: Tensor) -> bool:
    """Whether the kernels serve similarities [B, A] or tokens [B, L, D]: no gradient passes through
    them, and float64 has no kernel."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    fits = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.shape[1] <= _LARGEST
    return kernels_run_on(x) and fits and x.numel() > 0 and not wanted


def join_pairs(
    cosine: Tensor, partner: Tensor, length: int, start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Join the `count` most similar pairs of one round; the first fields of `Pairs`.

    Args:
        cosine: [B, A] of the patches at places start, start + 2, ...; of equal ones the first
            leaves, NaN counts as the highest.
        partner: [B, A] number of each one's best partner among the other patches.
        length: N, how many patches there are.
        start: 0 or 1.
        count: from 1 to A.

    Returns:
        everyone [B, N], joined [B, count].
    """
    return _join_pairs(cosine, partner, length, start, count)  # type: ignore[no-any-return]


def join_tokens(
    tokens: Tensor, sizes: Tensor, everyone: Tensor, joined: Tensor
) -> tuple[Tensor, Tensor]:
    """The prefix tokens and the means of groups, weighted by sizes; computed in fp32.

    Args:
        tokens: [B, P + N, D].
        sizes: [B, P + N], fp32.
        everyone: [B, N] places of the K patches that stand for groups, then of the others.
        joined: [B, N - K] the groups of the others.

    Returns:
        tokens [B, P + K, D], sizes [B, P + K].
    """
    return _join_tokens(tokens, sizes, everyone, joined)  # type: ignore[no-any-return]


def _run_pairs(
    cosine: Tensor, partner: Tensor, length: int, start: int, count: int
) -> tuple[Tensor, Tensor]:
    from tokenprune.ops.kernels import joining_triton

    made = _fake_pairs(cosine, partner, length, start, count)
    joining_triton.pairs(cosine, partner, length, start, count, made)
    return made


def _fake_pairs(
    cosine: Tensor, partner: Tensor, length: int, start: int, count: int
) -> tuple[Tensor, Tensor]:
    batch = cosine.shape[0]
    return partner.new_empty(batch, length), partner.new_empty(batch, count)


def _run_tokens(
    tokens: Tensor, sizes: Tensor, everyone: Tensor, joined: Tensor
) -> tuple[Tensor, Tensor]:
    from tokenprune.ops.kernels import joining_triton

    made = _fake_tokens(tokens, sizes, everyone, joined)
    joining_triton.means(tokens, sizes, everyone, joined, made)
    return made


def _fake_tokens(
    tokens: Tensor, sizes: Tensor, everyone: Tensor, joined: Tensor
) -> tuple[Tensor, Tensor]:
    batch, length, dim = tokens.shape
    left = length - joined.shape[1]
    return tokens.new_empty(batch, left, dim), sizes.new_empty(batch, left)


_join_pairs = define(
    "join_pairs",
    "(Tensor cosine, Tensor partner, SymInt length, int start, SymInt count) -> (Tensor, Tensor)",
    _run_pairs,
    _fake_pairs,
)
_join_tokens = define(
    "join_tokens",
    "(Tensor tokens, Tensor sizes, Tensor everyone, Tensor joined) -> (Tensor, Tensor)",
    _run_tokens,
    _fake_tokens,
)
