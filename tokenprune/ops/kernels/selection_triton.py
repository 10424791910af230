"""Triton kernels that choose the best tokens and move them; `selection.py` says what they do."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.ops.kernels.launch import launch
from tokenprune.ops.selection import GOLDEN, TIES

__all__ = ["gather", "select"]


@triton.jit
@no_type_check
def _raised(rank, least, by, K):
    """The largest of `least` and it plus 1, 2 and 3 times `by` that `K` of `rank` reach."""
    one = tl.sum((rank >= least + by).to(tl.int32), 0) >= K
    two = tl.sum((rank >= least + 2 * by).to(tl.int32), 0) >= K
    three = tl.sum((rank >= least + 3 * by).to(tl.int32), 0) >= K
    return least + by * (one.to(tl.int64) + two.to(tl.int64) + three.to(tl.int64))


@triton.jit
@no_type_check
def _finite(score):
    """NaN as the lowest score."""
    score = score.to(tl.float32)
    largest = 3.4028234663852886e38
    score = tl.where(score == score, score, -largest)
    return tl.minimum(tl.maximum(score, -largest), largest)


@triton.jit
@no_type_check
def _select(
    SCORE, NUMBERS, PLACES, KEPT, ssb, ssn, snb, N, K, HAS_NUMBERS: tl.constexpr, BN: tl.constexpr,
    GOLDEN: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """The `K` best of one image, ascending; of equal ones those that `tie_order` puts first. NaN is
    the lowest score."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    score = _finite(tl.load(SCORE + image * ssb + n * ssn, mask=n < N, other=0.0))
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 too
    # Whole numbers in the order of the scores, 0 for what is no token.
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    rank = tl.where(n < N, rank, 0)
    # The K-th largest, two bits at a time.
    least = tl.zeros([1], tl.int64)
    for step in range(16):
        least = _raised(rank, least, tl.full([1], 1 << 30, tl.int64) >> 2 * step, K)
    level = rank == least
    room = K - tl.sum((rank > least).to(tl.int32), 0)
    if HAS_NUMBERS:
        number = tl.load(NUMBERS + image * snb + n, mask=n < N, other=0)
    else:
        number = n.to(tl.int64)
    # Of those at the limit the first `room` in the order of ties, 1 to 2^20.
    tie = tl.where(level, (number * GOLDEN) % TIES + 1, 0)
    first = tl.zeros([1], tl.int64)
    for step in range(11):
        first = _raised(tie, first, tl.full([1], TIES, tl.int64) >> 2 * step, room)
    chosen = (rank > least) | (level & (tie >= first))
    to = image * K + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(PLACES + to, n.to(tl.int64), mask=chosen)
    if HAS_NUMBERS:
        tl.store(KEPT + to, number, mask=chosen)


@triton.jit
@no_type_check
def _above(
    SCORE, NUMBERS, PLACES, KEPT, COUNTS, ssb, ssn, snb, N, LEAST, HAS_NUMBERS: tl.constexpr,
    BN: tl.constexpr, GOLDEN: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """What is above `LEAST` in one image, ascending, then -1; the best one where nothing is."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    number = n.to(tl.int64)
    if HAS_NUMBERS:
        number = tl.load(NUMBERS + image * snb + n, mask=n < N, other=-1)
    there = (n < N) & (number >= 0)
    score = tl.load(SCORE + image * ssb + n * ssn, mask=there, other=0.0)
    chosen = there & (score > LEAST)
    score = tl.where(there, _finite(score), float("-inf"))
    tie = tl.where(there & (score == tl.max(score, 0)), (number * GOLDEN) % TIES + 1, 0)
    best = there & (tie == tl.max(tie, 0))
    chosen = chosen | (best & (tl.sum(chosen.to(tl.int32), 0) == 0))
    count = tl.sum(chosen.to(tl.int32), 0)
    to = image * N + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(PLACES + to, n.to(tl.int64), mask=chosen)
    tl.store(KEPT + to, number, mask=chosen)
    rest = image * N + n
    nothing = tl.full([BN], -1, tl.int64)
    tl.store(PLACES + rest, nothing, mask=(n >= count) & (n < N))
    tl.store(KEPT + rest, nothing, mask=(n >= count) & (n < N))
    tl.store(COUNTS + image, count.to(tl.int64))


@triton.jit
@no_type_check
def _gather(
    X, PLACES, STARTS, OUT, sxb, sxl, spb, P, K, D, PACKED: tl.constexpr, BR: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """`BR` rows of one image: prefix tokens, then those at `PLACES`."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BR + tl.arange(0, BR)
    begin, length = image * (P + K), P + K
    if PACKED:
        begin = tl.load(STARTS + image).to(tl.int64)
        length = (tl.load(STARTS + image + 1) - begin).to(tl.int32)
    there = row < length
    place = tl.load(PLACES + image * spb + row - P, mask=there & (row >= P), other=0)
    place = tl.where(row < P, row.to(tl.int64), place + P)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = there[:, None] & (d < D)[None, :]
        x = tl.load(X + image * sxb + place[:, None] * sxl + d[None, :], mask=inside)
        tl.store(OUT + (begin + row[:, None]) * D + d[None, :], x, mask=inside)


def select(score: Tensor, numbers: Tensor | None, num_keep: int) -> tuple[Tensor, Tensor]:
    """Places [B, K] of the best, and `numbers` [B, N] there (the places if None)."""
    batch, length = score.shape
    places = torch.empty(batch, num_keep, dtype=torch.int64, device=score.device)
    block = max(triton.next_power_of_2(length), 32)
    given = places if numbers is None else numbers.contiguous()
    kept = places if numbers is None else torch.empty_like(places)
    launch(
        _select, (batch,),
        score, given, places, kept, *score.stride(), given.stride(0), length, num_keep,
        options={"num_warps": 1 if block <= 512 else 4}, HAS_NUMBERS=numbers is not None, BN=block,
        GOLDEN=GOLDEN, TIES=TIES,
    )  # fmt: skip
    return places, kept


def select_above(
    score: Tensor, numbers: Tensor | None, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Places and `numbers` [B, N] of what is above `least`, and how many are [B]."""
    batch, length = score.shape
    places = torch.empty(batch, length, dtype=torch.int64, device=score.device)
    kept, counts = torch.empty_like(places), places.new_empty(batch)
    block = max(triton.next_power_of_2(length), 32)
    given = places if numbers is None or numbers.stride(1) != 1 else numbers
    if numbers is not None and given is places:
        given = numbers.contiguous()
    launch(
        _above, (batch,),
        score, given, places, kept, counts, *score.stride(), given.stride(0), length, least,
        options={"num_warps": 1 if block <= 512 else 4}, HAS_NUMBERS=numbers is not None, BN=block,
        GOLDEN=GOLDEN, TIES=TIES,
    )  # fmt: skip
    return places, kept, counts


def gather(
    tokens: Tensor,
    places: Tensor,
    num_prefix: int,
    starts: Tensor | None = None,
    total: int = 0,
) -> Tensor:
    """The prefix tokens of [B, P + N, D], and the patches at `places` [B, K]. With `starts`
    [B + 1], where each image starts in a row of `total` tokens: [total, D]."""
    x = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, _, dim = x.shape
    length = num_prefix + places.shape[1]
    out = x.new_empty(batch, length, dim) if starts is None else x.new_empty(total, dim)
    rows = 8
    launch(
        _gather, (batch, triton.cdiv(length, rows)),
        x, places, places if starts is None else starts, out, *x.stride()[:2], places.stride(0),
        num_prefix, places.shape[1], dim, options={"num_warps": 4}, PACKED=starts is not None,
        BR=rows, BD=min(triton.next_power_of_2(dim), 512),
    )  # fmt: skip
    return out
