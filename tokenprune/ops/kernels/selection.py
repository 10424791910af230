"""Choose the best patches of each image and move their tokens: one operator, two kernels."""

import torch
from torch import Tensor

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = ["can_select", "keep_best"]

_LARGEST = 16384  # tokens of an image that one program holds


def can_select(tokens: Tensor, score: Tensor) -> bool:
    """Whether the kernels serve these: no gradient passes through them."""
    wanted = torch.is_grad_enabled() and (tokens.requires_grad or score.requires_grad)
    fits = tokens.ndim == 3 and score.dtype == torch.float32 and score.shape[1] <= _LARGEST
    return kernels_run_on(tokens) and fits and tokens.numel() > 0 and not wanted


def keep_best(
    tokens: Tensor, score: Tensor, numbers: Tensor | None, num_keep: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Remove all patches but the best.

    Args:
        tokens: [B, P + N, D].
        score: [B, N], fp32; `ops.selection.tie_order` chooses among equal ones, NaN is the lowest.
        numbers: [B, N] original numbers of the patches; None if patch i is number i.
        num_keep: K, from 1 to N.
        num_prefix: P.

    Returns:
        tokens [B, P + K, D], and the numbers [B, K] of the kept patches, ascending by place.
    """
    return _operator(tokens, score, numbers, num_keep, num_prefix)  # type: ignore[no-any-return]


def _keep_best(
    tokens: Tensor, score: Tensor, numbers: Tensor | None, num_keep: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    from tokenprune.ops.kernels import selection_triton

    places, kept = selection_triton.select(score, numbers, num_keep)
    return selection_triton.gather(tokens, places, num_prefix), kept


def _fake(
    tokens: Tensor, score: Tensor, numbers: Tensor | None, num_keep: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    batch, _, dim = tokens.shape
    kept = score.new_empty(batch, num_keep, dtype=torch.int64)
    return tokens.new_empty(batch, num_prefix + num_keep, dim), kept


_operator = define(
    "keep_best",
    "(Tensor tokens, Tensor score, Tensor? numbers, int num_keep, int num_prefix)"
    " -> (Tensor, Tensor)",
    _keep_best,
    _fake,
)
