"""Choose patches of each image and move their tokens: the best by one operator of two kernels;
those above a threshold by one each, since Python has to know their number in between."""

import torch
from torch import Tensor

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = [
    "can_keep_above",
    "can_select",
    "can_take_rows",
    "keep_above",
    "keep_best",
    "take_rows",
]

_LARGEST = 16384  # tokens of an image that one program holds


def can_select(tokens: Tensor, score: Tensor) -> bool:
    """Whether the kernels serve these: no gradient passes through them."""
    wanted = torch.is_grad_enabled() and (tokens.requires_grad or score.requires_grad)
    fits = tokens.ndim == 3 and score.dtype == torch.float32 and score.shape[1] <= _LARGEST
    return kernels_run_on(tokens) and fits and tokens.numel() > 0 and not wanted


def can_keep_above(score: Tensor) -> bool:
    """Whether the kernel serves these scores [B, N]."""
    fits = score.dtype == torch.float32 and score.shape[1] <= _LARGEST and score.numel() > 0
    return kernels_run_on(score) and fits


def keep_above(
    score: Tensor, numbers: Tensor | None, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The patches above a score, the best one where none is: `ops.selection.above_threshold`.

    Args:
        score: [B, N], fp32.
        numbers: [B, N] original numbers of the patches, -1 at the end of a row that holds fewer;
            None if patch i is number i.
        least: what a score must exceed.

    Returns:
        Their places and numbers, [B, N] each: ascending, then -1; how many each image has, [B].
    """
    return _above_operator(score, numbers, least)  # type: ignore[no-any-return]


def can_take_rows(tokens: Tensor) -> bool:
    """Whether the kernel serves these tokens [B, L, D]: no gradient passes through it."""
    wanted = torch.is_grad_enabled() and tokens.requires_grad
    return kernels_run_on(tokens) and tokens.ndim == 3 and tokens.numel() > 0 and not wanted


def take_rows(
    tokens: Tensor, places: Tensor, starts: Tensor, total: int, num_prefix: int
) -> Tensor:
    """The prefix tokens and the patches at `places` [B, K] of all images, one after the other.

    Args:
        tokens: [B, P + N, D].
        starts: [B + 1] where each image starts among the [total, D], int32.
    """
    return _rows_operator(tokens, places, starts, total, num_prefix)  # type: ignore[no-any-return]


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


def _keep_above(score: Tensor, numbers: Tensor | None, least: float) -> tuple[Tensor, ...]:
    from tokenprune.ops.kernels import selection_triton

    return selection_triton.select_above(score, numbers, least)


def _fake_above(score: Tensor, numbers: Tensor | None, least: float) -> tuple[Tensor, ...]:
    places = score.new_empty(score.shape, dtype=torch.int64)
    return places, torch.empty_like(places), places.new_empty(len(score))


_above_operator = define(
    "keep_above",
    "(Tensor score, Tensor? numbers, float least) -> (Tensor, Tensor, Tensor)",
    _keep_above,
    _fake_above,
)


def _take_rows(
    tokens: Tensor, places: Tensor, starts: Tensor, total: int, num_prefix: int
) -> Tensor:
    from tokenprune.ops.kernels import selection_triton

    return selection_triton.gather(tokens, places, num_prefix, starts, total)


def _fake_rows(
    tokens: Tensor, places: Tensor, starts: Tensor, total: int, num_prefix: int
) -> Tensor:
    return tokens.new_empty(total, tokens.shape[2])


_rows_operator = define(
    "take_rows",
    "(Tensor tokens, Tensor places, Tensor starts, int total, int num_prefix) -> Tensor",
    _take_rows,
    _fake_rows,
)
