"""The Triton kernel of a predictor's later layers; `scores.py` says what it does."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["finish"]


@triton.jit
@no_type_check
def _activate(x, ACTIVATION: tl.constexpr):
    """In fp32, as torch does it."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x / (1.0 + tl.exp(-x))


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


def finish(
    rows: Tensor, shared: Tensor, weight: Tensor, bias: Tensor, last: Tensor, last_bias: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """[B, N, 2] log-probabilities of `rows` [B, N, H] and `shared` [B, 1, H]."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    shared = shared if shared.stride(-1) == 1 else shared.contiguous()
    batch, length, hidden = rows.shape
    narrow = weight.shape[0]
    out = torch.empty(batch, length, 2, dtype=torch.float32, device=rows.device)
    wide = max(triton.next_power_of_2(narrow), 16)
    tokens, chunk = (64, 64) if wide <= 128 else (32, 32)
    _finish[(batch, triton.cdiv(length, tokens))](
        rows, shared, weight, bias, last, last_bias, out,
        *rows.stride()[:2], shared.stride(0), length, hidden, narrow,
        ACTIVATION=activation, PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        BN=tokens, BH=chunk, BM=wide, num_warps=4,
    )  # fmt: skip
    return out
