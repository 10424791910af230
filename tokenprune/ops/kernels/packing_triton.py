"""The Triton kernel of `packing.py`."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.ops.kernels.launch import launch

__all__ = ["place"]


@triton.jit
@no_type_check
def _place(
    COUNTS, ROWS, BACK, STARTS, B, L, P, BB: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """The tokens of one image."""
    image = tl.program_id(0)
    start = tl.zeros([1], tl.int64)
    for first in range(0, image, BB):
        before = first + tl.arange(0, BB)
        inside = before < image
        start += tl.sum(tl.load(COUNTS + before, mask=inside, other=-P) + P, 0)
    count = tl.load(COUNTS + image) + P
    at = tl.arange(0, BL)
    place = image.to(tl.int64) * L + at
    tl.store(ROWS + start + at, place, mask=at < count)
    tl.store(BACK + place, start + tl.minimum(at, count - 1), mask=at < L)
    tl.store(STARTS + image + tl.arange(0, 1), start.to(tl.int32))
    last = tl.arange(0, 1) + image == B - 1
    tl.store(STARTS + image + 1 + tl.arange(0, 1), (start + count).to(tl.int32), mask=last)


def place(counts: Tensor, longest: int, total: int, num_prefix: int) -> tuple[Tensor, ...]:
    """`rows` [total], `back` [B * L] and `starts` [B + 1]; see `packing.place_rows`."""
    batch, length = len(counts), num_prefix + longest
    rows = torch.empty(total, dtype=torch.int64, device=counts.device)
    back = rows.new_empty(batch * length)
    starts = rows.new_empty(batch + 1, dtype=torch.int32)
    launch(
        _place, (batch,), counts, rows, back, starts, batch, length, num_prefix,
        options={"num_warps": 4}, BB=min(triton.next_power_of_2(batch), 1024),
        BL=triton.next_power_of_2(length),
    )  # fmt: skip
    return rows, back, starts
