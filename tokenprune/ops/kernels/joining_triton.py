"""Triton kernels that join pairs of tokens; `joining.py` says what they do."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from tokenprune.ops.kernels.launch import launch

__all__ = ["means", "pairs"]


@triton.jit
@no_type_check
def _pairs(
    COSINE, PARTNER, EVERYONE, JOINED, scb, scn, spb, spn, N, A, COUNT, START,
    BA: tl.constexpr,
):  # fmt: skip
    """One image: the `COUNT` most similar leave; of equal ones the first, NaN is the highest."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BA)
    there = n < A
    cosine = tl.load(COSINE + image * scb + n * scn, mask=there, other=0.0)
    partner = tl.load(PARTNER + image * spb + n * spn, mask=there, other=0)
    value = tl.where(cosine == cosine, cosine.to(tl.float32), 3.4028234663852886e38)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 too
    # Whole numbers in the order of the values, 0 for what is no token.
    bits = value.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    rank = tl.where(there, rank, 0)
    # The COUNT-th largest, bit by bit.
    least = tl.zeros([1], tl.int64)
    for step in range(32):
        higher = least + (tl.full([1], 2147483648, tl.int64) >> step)
        enough = tl.sum((rank >= higher).to(tl.int32), 0) >= COUNT
        least = tl.where(enough, higher, least)
    level = rank == least
    room = COUNT - tl.sum((rank > least).to(tl.int32), 0)
    leaves = (rank > least) | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    leaves = leaves & there
    stays = there & (leaves == 0)
    place = 2 * n + START
    group = tl.cumsum(stays.to(tl.int32), 0) - 1
    at = tl.cumsum(leaves.to(tl.int32), 0) - 1
    row = tl.where(leaves, N - COUNT + at, group)
    tl.store(EVERYONE + image * N + row, place.to(tl.int64), mask=there)
    tl.store(JOINED + image * COUNT + at, A - COUNT + partner, mask=leaves)
    other = n < N - A  # the patches that the first ones are compared with
    place = 2 * n + 1 - START
    tl.store(EVERYONE + image * N + A - COUNT + n, place.to(tl.int64), mask=other)


@triton.jit
@no_type_check
def _means(
    X, SIZES, EVERYONE, JOINED, OUT, LEFT, sxb, sxl, ssb, seb, sjb, P, K, R, D,
    BL: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`BL` rows of one image: each kept token, and what joined it."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BL + tl.arange(0, BL)
    there = row < P + K
    place = tl.load(EVERYONE + image * seb + row - P, mask=there & (row >= P), other=0)
    place = tl.where(row < P, row.to(tl.int64), place + P)
    size = tl.load(SIZES + image * ssb + place, mask=there, other=1.0)
    r = tl.arange(0, BR)
    to = tl.load(JOINED + image * sjb + r, mask=r < R, other=-1 - P) + P
    gone = tl.load(EVERYONE + image * seb + K + r, mask=r < R, other=0) + P
    weight = tl.load(SIZES + image * ssb + gone, mask=r < R, other=0.0)
    size += tl.sum(tl.where(to[None, :] == row[:, None], weight[None, :], 0.0), 1)
    tl.store(LEFT + image * (P + K) + row, size, mask=there)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = there[:, None] & (d < D)[None, :]
        own = tl.load(X + image * sxb + place[:, None] * sxl + d[None, :], mask=inside, other=0.0)
        own = own.to(tl.float32)
        mean = own
        for i in range(R):
            hit = row == tl.load(JOINED + image * sjb + i) + P
            if tl.sum(hit.to(tl.int32), 0) > 0:
                source = tl.load(EVERYONE + image * seb + K + i) + P
                share = tl.load(SIZES + image * ssb + source) / size
                x = tl.load(X + image * sxb + source * sxl + d, mask=d < D, other=0.0)
                moved = mean + (x.to(tl.float32)[None, :] - own) * share[:, None]
                mean = tl.where(hit[:, None], moved, mean)
        to_row = OUT + (image * (P + K) + row[:, None]) * D + d[None, :]
        tl.store(to_row, mean, mask=inside)


def pairs(
    cosine: Tensor, partner: Tensor, length: int, start: int, count: int, made: tuple[Tensor, ...]
) -> None:
    """Fill everyone and joined."""
    batch, first = cosine.shape
    block = max(triton.next_power_of_2(max(first, length - first)), 32)
    launch(
        _pairs, (batch,),
        cosine, partner, *made, *cosine.stride(), *partner.stride(), length, first, count, start,
        options={"num_warps": 1 if block <= 512 else 4}, BA=block,
    )  # fmt: skip


def means(
    tokens: Tensor, sizes: Tensor, everyone: Tensor, joined: Tensor, made: tuple[Tensor, ...]
) -> None:
    """Fill tokens and sizes."""
    x = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    sizes, everyone, joined = (y.contiguous() for y in (sizes, everyone, joined))
    batch, length, dim = x.shape
    count, patches = joined.shape[1], everyone.shape[1]
    left, rows = length - count, 8
    launch(
        _means, (batch, triton.cdiv(left, rows)),
        x, sizes, everyone, joined, *made, *x.stride()[:2],
        *(y.stride(0) for y in (sizes, everyone, joined)), length - patches, patches - count, count,
        dim, options={"num_warps": 4}, BL=rows, BR=max(triton.next_power_of_2(count), 16),
        BD=min(triton.next_power_of_2(dim), 512),
    )  # fmt: skip
