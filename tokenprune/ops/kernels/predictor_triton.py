"""Triton kernels of the learned predictor; `predictor.py` says what they compute."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["features", "logits"]


@triton.jit
@no_type_check
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
@no_type_check
def _features(
    X, G, B, W, BIAS, LOCAL, PARTS, sxb, sxl, N, D, HALF, eps,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """GELU of a linear layer of the normalised tokens, for `BM` tokens and `BN` channels: the local
    half is written, the shared half is added up over the tokens."""
    image, tile, tiles = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    m, k = tile * BM + tl.arange(0, BM), tl.arange(0, BK)
    # Column tiles start at 0 and at HALF, so none holds both halves.
    columns = tl.program_id(0)
    first = tl.cdiv(HALF, BN)
    start = tl.where(columns < first, columns * BN, HALF + (columns - first) * BN)
    end = tl.where(columns < first, HALF, D)
    c = start + tl.arange(0, BN)
    rows = (m < N)[:, None]
    X += image * sxb + m[:, None] * sxl
    total = tl.zeros([BM], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for at in range(0, D, BK):
        x = tl.load(X + (at + k)[None, :], mask=rows & (at + k < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(x, 1)
    mean = total / D
    for at in range(0, D, BK):
        inside = (at + k < D)[None, :]
        x = tl.load(X + (at + k)[None, :], mask=rows & inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - mean[:, None], 0.0)
        square += tl.sum(x * x, 1)
    rstd = 1.0 / tl.sqrt(square / D + eps)
    acc = tl.zeros([BM, BN], tl.float32)
    for at in range(0, D, BK):
        inside = at + k < D
        x = tl.load(X + (at + k)[None, :], mask=rows & inside[None, :], other=0.0).to(tl.float32)
        g = tl.load(G + at + k, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + at + k, mask=inside, other=0.0).to(tl.float32)
        x = (x - mean[:, None]) * rstd[:, None] * g[None, :] + b[None, :]
        w = tl.load(
            W + c[None, :] * D + (at + k)[:, None],
            mask=inside[:, None] & (c < end)[None, :],
            other=0.0,
        )
        acc += tl.dot(x.to(w.dtype), w, input_precision=PRECISION)
    acc += tl.load(BIAS + c, mask=c < end, other=0.0).to(tl.float32)[None, :]
    low = LOCAL.dtype.element_ty
    out = _gelu(acc.to(low).to(tl.float32)).to(low)
    if columns < first:
        to = LOCAL + (image * N + m[:, None]) * HALF + c[None, :]
        tl.store(to, out, mask=rows & (c < end)[None, :])
    else:
        part = tl.sum(tl.where(rows, out.to(tl.float32), 0.0), 0)
        tl.store(PARTS + (image * tiles + tile) * (D - HALF) + c - HALF, part, mask=c < end)


@triton.jit
@no_type_check
def _logits(
    LOCAL, COMMON, W1, W2, B2, W3, B3, OUT, N, HALF, HIDDEN, NARROW, sw1,
    PRECISION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of `BM` tokens of one image: the MLP on the local half, to which `COMMON`
    gives what the shared half adds to the first layer. `BC` hidden channels at a time."""
    image = tl.program_id(0).to(tl.int64)
    m, h, w = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BH), tl.arange(0, BW)
    low = LOCAL.dtype.element_ty
    inside = (m < N)[:, None] & (h < HALF)[None, :]
    local = tl.load(LOCAL + (image * N + m[:, None]) * HALF + h[None, :], mask=inside, other=0.0)
    acc = tl.zeros([BM, BW], tl.float32)
    for at in range(0, HIDDEN, BC):
        c = at + tl.arange(0, BC)
        w1 = tl.load(
            W1 + c[None, :] * sw1 + h[:, None],
            mask=(c < HIDDEN)[None, :] & (h < HALF)[:, None],
            other=0.0,
        )
        hidden = tl.dot(local, w1, input_precision=PRECISION)
        common = tl.load(COMMON + image * HIDDEN + c, mask=c < HIDDEN, other=0.0).to(tl.float32)
        hidden = _gelu(hidden.to(low).to(tl.float32) + common[None, :]).to(low)
        w2 = tl.load(
            W2 + w[None, :] * HIDDEN + c[:, None],
            mask=(w < NARROW)[None, :] & (c < HIDDEN)[:, None],
            other=0.0,
        )
        acc += tl.dot(hidden, w2, input_precision=PRECISION)
    acc += tl.load(B2 + w, mask=w < NARROW, other=0.0).to(tl.float32)[None, :]
    narrow = _gelu(acc.to(low).to(tl.float32)).to(low).to(tl.float32)
    keep = tl.load(W3 + w, mask=w < NARROW, other=0.0).to(tl.float32)
    drop = tl.load(W3 + NARROW + w, mask=w < NARROW, other=0.0).to(tl.float32)
    keep = (tl.sum(narrow * keep[None, :], 1) + tl.load(B3).to(tl.float32)).to(low).to(tl.float32)
    drop = tl.sum(narrow * drop[None, :], 1) + tl.load(B3 + 1).to(tl.float32)
    drop = drop.to(low).to(tl.float32)
    high = tl.maximum(keep, drop)
    lse = high + tl.log(tl.exp(keep - high) + tl.exp(drop - high))
    out = OUT + (image * N + m) * 2
    tl.store(out, keep - lse, mask=m < N)
    tl.store(out + 1, drop - lse, mask=m < N)


def _precision(x: Tensor) -> str:
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def features(
    tokens: Tensor, norm: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The local half [B, N, D // 2], and sums [B, tiles, D - D // 2] of the shared half over each
    tile of tokens; adding them up in a fixed order keeps scores the same from run to run."""
    x = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, length, dim = x.shape
    half = dim // 2
    rows = 64 if x.dtype != torch.float32 else 32
    columns = min(max(triton.next_power_of_2(half), 16), 128 if rows == 64 else 64)
    count = triton.cdiv(half, columns) + triton.cdiv(dim - half, columns)
    tiles = triton.cdiv(length, rows)
    local = x.new_empty(batch, length, half)
    parts = x.new_empty(batch, tiles, dim - half, dtype=torch.float32)
    # Column tiles come first, so that those of one row tile run together and find it in L2.
    _features[(count, batch, tiles)](
        x, norm, shift, weight, bias, local, parts, *x.stride()[:2], length, dim, half, eps,
        PRECISION=_precision(x), BM=rows, BN=columns, BK=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    return local, parts


def logits(
    local: Tensor,
    common: Tensor,
    first: Tensor,
    second: Tensor,
    second_bias: Tensor,
    last: Tensor,
    last_bias: Tensor,
) -> Tensor:
    """Log-probabilities [B, N, 2] in fp32; `common` [B, hidden] holds the first layer's bias."""
    batch, length, half = local.shape
    hidden, narrow = first.shape[0], second.shape[0]
    out = local.new_empty(batch, length, 2, dtype=torch.float32)
    rows = 64 if local.dtype != torch.float32 and half <= 256 else 32
    _logits[(batch, triton.cdiv(length, rows))](
        local, common, first, second, second_bias, last, last_bias, out,
        length, half, hidden, narrow, first.stride(0),
        PRECISION=_precision(local), BM=rows, BC=32,
        BH=max(16, triton.next_power_of_2(half)), BW=max(16, triton.next_power_of_2(narrow)),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
