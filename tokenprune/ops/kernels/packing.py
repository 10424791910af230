"""Where the tokens of images that keep different numbers of them are, in a row without gaps."""

from typing import Any

import torch
from torch import Tensor

from tokenprune.ops.kernels import define, kernels_run_on

__all__ = ["can_place", "place_rows"]


def can_place(counts: Tensor) -> bool:
    """Whether the kernel serves these counts [B]."""
    return kernels_run_on(counts) and counts.dtype == torch.int64 and counts.numel() > 0


def place_rows(
    counts: Tensor, longest: int, total: int, num_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, `back` and `starts` of `ops.varlen.Lengths`.

    Args:
        counts: [B] how many patches each image keeps.
        longest: the most that one keeps.
        total: T, how many tokens all images have, prefix tokens included.
    """
    return _operator(counts, longest, total, num_prefix)  # type: ignore[no-any-return]


def _place(*args: Any) -> tuple[Tensor, ...]:
    from tokenprune.ops.kernels import packing_triton

    return packing_triton.place(*args)


def _fake(counts: Tensor, longest: int, total: int, num_prefix: int) -> tuple[Tensor, ...]:
    back = counts.new_empty(len(counts) * (num_prefix + longest))
    starts = counts.new_empty(len(counts) + 1, dtype=torch.int32)
    return counts.new_empty(total), back, starts


_operator = define(
    "place_rows",
    "(Tensor counts, int longest, int total, int num_prefix) -> (Tensor, Tensor, Tensor)",
    _place,
    _fake,
)
