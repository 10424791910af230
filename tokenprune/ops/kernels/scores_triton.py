"""Triton kernels between the matrix products of a predictor; `scores.py` says what they do."""

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.ops.kernels.launch import launch

__all__ = ["predict"]

FULL = 128
"""Programs that fill a card; with fewer, smaller tiles finish earlier."""


@triton.jit
@no_type_check
def _erf(x):
    """To 2e-7 (Abramowitz and Stegun, 7.1.26), in fewer instructions than the library's."""
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    sum = t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    sum = t * (0.254829592 + t * (-0.284496736 + sum))
    erf = 1.0 - sum * tl.exp(-x * x)
    return tl.where(x < 0.0, -erf, erf)


@triton.jit
@no_type_check
def _activate(x, ACTIVATION: tl.constexpr):
    """In fp32, as torch does it."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x / (1.0 + tl.exp(-x))


@triton.jit
@no_type_check
def _normalise(
    X, PRESENT, W, BIAS, OUT, sxb, sxn, spb, N, D, eps,
    HAS_PRESENT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Layer norm of `BN` tokens of one image; inf and NaN of tokens that are not there are 0."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = (n < N)[:, None] & (d < D)[None, :]
    x = tl.load(X + image * sxb + n[:, None] * sxn + d[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if HAS_PRESENT:
        there = tl.load(PRESENT + image * spb + n, mask=n < N, other=0.0) > 0.5
        x = tl.where(there[:, None] | (tl.abs(x) < float("inf")), x, 0.0)
    away = tl.where(inside, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(away * away, 1) / D + eps)
    weight = tl.load(W + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    y = away * scale[:, None] * weight[None, :] + bias[None, :]
    to = OUT + (image * N + n[:, None]) * D + d[None, :]
    tl.store(to, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _split(
    X, PRESENT, LOCAL, MEAN, spb, N, D, HALF, ACTIVATION: tl.constexpr,
    HAS_PRESENT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The activation of `BD` channels of one image: of the first `HALF` for each token, of the
    others their mean over the tokens that are there."""
    image = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    kind = X.dtype.element_ty
    total = tl.zeros([BD], tl.float32)
    count = tl.zeros([1], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        inside = (n < N)[:, None] & (d < D)[None, :]
        row = image * N + n[:, None]
        x = tl.load(X + row * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        x = _activate(x, ACTIVATION).to(kind)
        tl.store(LOCAL + row * HALF + d[None, :], x, mask=inside & (d < HALF)[None, :])
        share = tl.where(n < N, 1.0, 0.0)
        x = tl.where(inside, x.to(tl.float32), 0.0)
        if HAS_PRESENT:
            share = tl.load(PRESENT + image * spb + n, mask=n < N, other=0.0).to(tl.float32)
            there = (share > 0.5)[:, None]
            x = tl.where(there | (tl.abs(x) < float("inf")), x, 0.0) * share[:, None]
        total += tl.sum(x, 0)
        count += tl.sum(share, 0)
    mean = total / tl.where(count == 0, 1.0, count)
    to = MEAN + image * (D - HALF) + d - HALF
    tl.store(to, mean.to(kind), mask=(d >= HALF) & (d < D))


@triton.jit
@no_type_check
def _finish(
    ROWS, SHARED, W, BIAS, LAST, LAST_BIAS, OUT, srb, srn, ssb, N, H, M,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`BN` tokens of one image. Rounds where the layers would, one by one."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    kind = ROWS.dtype.element_ty
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        inside = (n < N)[:, None] & (h < H)[None, :]
        own = tl.load(ROWS + image * srb + n[:, None] * srn + h[None, :], mask=inside, other=0.0)
        common = tl.load(SHARED + image * ssb + h, mask=h < H, other=0.0)
        x = (own.to(tl.float32) + common.to(tl.float32)[None, :]).to(kind).to(tl.float32)
        x = _activate(x, ACTIVATION).to(kind)
        weight = tl.load(
            W + m[None, :] * H + h[:, None], mask=(m < M)[None, :] & (h < H)[:, None], other=0.0
        )
        acc += tl.dot(x, weight, input_precision=PRECISION)
    bias = tl.load(BIAS + m, mask=m < M, other=0.0).to(tl.float32)
    hidden = _activate((acc + bias[None, :]).to(kind).to(tl.float32), ACTIVATION)
    hidden = tl.where((m < M)[None, :], hidden.to(kind).to(tl.float32), 0.0)  # inf * 0 is NaN
    keep = tl.load(LAST + m, mask=m < M, other=0.0).to(tl.float32)
    drop = tl.load(LAST + M + m, mask=m < M, other=0.0).to(tl.float32)
    keep = tl.sum(hidden * keep[None, :], 1) + tl.load(LAST_BIAS).to(tl.float32)
    drop = tl.sum(hidden * drop[None, :], 1) + tl.load(LAST_BIAS + 1).to(tl.float32)
    keep, drop = keep.to(kind).to(tl.float32), drop.to(kind).to(tl.float32)
    most = tl.maximum(keep, drop)
    total = most + tl.log(tl.exp(keep - most) + tl.exp(drop - most))
    to = OUT + (image * N + n) * 2
    tl.store(to, keep - total, mask=n < N)
    tl.store(to + 1, drop - total, mask=n < N)


def predict(
    tokens: Tensor, present: Tensor | None, parameters: list[Tensor], eps: float, activation: str
) -> Tensor:
    """[B, N, 2] log-probabilities of `tokens` [B, N, D]."""
    norm, norm_bias, project, project_bias, first, first_bias, *last = parameters
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, length, dim = tokens.shape
    rows, half = batch * length, dim // 2
    given = tokens if present is None else present.contiguous()
    there = {"HAS_PRESENT": present is not None}
    flat = tokens.new_empty(rows, dim)
    wide, tile = triton.next_power_of_2(dim), 4
    launch(
        _normalise, (batch, triton.cdiv(length, tile)),
        tokens, given, norm, norm_bias, flat, *tokens.stride()[:2], given.stride(0), length, dim,
        eps, options={"num_warps": 4}, **there, BN=tile, BD=wide,
    )  # fmt: skip
    features = F.linear(flat, project, project_bias)
    few = batch * triton.cdiv(length, 64) < FULL
    width = features.shape[1]
    local, mean = features.new_empty(rows, half), features.new_empty(batch, width - half)
    block = (256, 16) if few else (32, 64)
    launch(
        _split, (batch, triton.cdiv(width, block[1])),
        features, given, local, mean, given.stride(0), length, width, half,
        options={"num_warps": 4}, ACTIVATION=activation, **there, BN=block[0], BD=block[1],
    )  # fmt: skip
    of_token, of_image = (
        F.linear(local, first[:, :half]),
        F.linear(mean, first[:, half:], first_bias),
    )
    return _scores(of_token.view(batch, length, -1), of_image, last, activation)


def _scores(rows: Tensor, shared: Tensor, last: list[Tensor], activation: str) -> Tensor:
    """[B, N, 2] log-probabilities of `rows` [B, N, H] and `shared` [B, H]."""
    batch, length, hidden = rows.shape
    narrow = last[0].shape[0]
    out = torch.empty(batch, length, 2, dtype=torch.float32, device=rows.device)
    wide = max(triton.next_power_of_2(narrow), 16)
    tokens, chunk = (64, 32) if wide <= 128 else (32, 32)
    if batch * triton.cdiv(length, tokens) < FULL:
        tokens, chunk = 16, 64
    launch(
        _finish, (batch, triton.cdiv(length, tokens)),
        rows, shared, *last, out, *rows.stride()[:2], shared.stride(0), length, hidden, narrow,
        options={"num_warps": 4}, ACTIVATION=activation,
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32", BN=tokens, BH=chunk, BM=wide,
    )  # fmt: skip
    return out
