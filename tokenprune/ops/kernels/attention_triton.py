"""Triton kernels of masked attention; `attention.py` says what they compute.

All loops are over tiles of the [Lq, Lk] logits, which are never written to memory. Logits are in
units of log 2, since `exp2` is what the hardware has.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.ops.kernels.launch import launch

__all__ = ["Tiles", "backward", "forward", "tiles"]

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """How a kernel is launched: queries and keys of a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
@no_type_check
def _finite(x, kept):
    """`x` with inf and NaN of dropped tokens as 0: a weight of 0 would turn them into NaN."""
    return tl.where(kept | (tl.abs(x) < float("inf")), x, 0.0)


@triton.jit
@no_type_check
def _logits(
    q,
    k,
    mask,
    m,
    n,
    num_queries,
    num_keys,
    smq,
    smk,
    factor,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits [m, n] of a tile with the host's mask, -inf outside of the keys. `k` is [d, n]."""
    s = tl.dot(q, k, input_precision=PRECISION) * factor
    inside = (m < num_queries)[:, None] & (n < num_keys)[None, :]
    if MASK == 1:
        seen = tl.load(mask + m[:, None] * smq + n[None, :] * smk, mask=inside, other=0)
        s = tl.where(seen != 0, s, float("-inf"))
    if MASK == 2:
        bias = tl.load(mask + m[:, None] * smq + n[None, :] * smk, mask=inside, other=0.0)
        s += bias.to(tl.float32) * 1.4426950408889634
    return tl.where((n < num_keys)[None, :], s, float("-inf"))


@triton.jit
@no_type_check
def _weights(s, lse):
    """`exp(min(s - lse, 0))`, 0 where s is -inf also in a row that sees nothing (lse = -inf)."""
    return tl.where(s == float("-inf"), 0.0, tl.exp2(tl.minimum(s - lse, 0.0)))


@triton.jit
@no_type_check
def _forward(
    Q, K, V, P, M, OUT, LSE,
    sqb, sqh, sql, skb, skh, skl, svb, svh, svl, sob, soh, sol, smb, smh, smq, smk,
    heads, num_queries, num_keys, dim, dim_v, factor,
    OWN: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    m, d, dv = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    rows = (m < num_queries)[:, None]
    Q, K, V = (
        Q + image * sqb + head * sqh,
        K + image * skb + head * skh,
        V + image * svb + head * svh,
    )
    M += image * smb + head * smh
    q = tl.load(Q + m[:, None] * sql + d[None, :], mask=rows & (d < dim)[None, :], other=0.0)
    high = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for start in range(0, num_keys, BN):
        n = start + tl.arange(0, BN)
        here = n < num_keys
        kept = tl.load(P + image * num_keys + n, mask=here, other=0.0) > 0.5
        k = tl.load(
            K + n[None, :] * skl + d[:, None], mask=here[None, :] & (d < dim)[:, None], other=0.0
        )
        k = _finite(k, kept[None, :])
        s = _logits(q, k, M, m, n, num_queries, num_keys, smq, smk, factor, MASK, PRECISION)
        seen = kept[None, :]
        if OWN:
            seen = seen | (m[:, None] == n[None, :])
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(high, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(s - base[:, None])
        shrink = tl.exp2(high - base)
        v = tl.load(
            V + n[:, None] * svl + dv[None, :],
            mask=here[:, None] & (dv < dim_v)[None, :],
            other=0.0,
        )
        v = _finite(v, kept[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        high = higher
    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), high + tl.log2(tl.where(nothing, 1.0, total)))
    out = OUT + image * sob + head * soh + m[:, None] * sol + dv[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=rows & (dv < dim_v)[None, :])
    tl.store(LSE + tl.program_id(0).to(tl.int64) * num_queries + m, lse, mask=m < num_queries)


@triton.jit
@no_type_check
def _backward_keys(
    Q, K, V, P, M, G, LSE, DRIFT, DK, DV, DP,
    sqb, sqh, sql, skb, skh, skl, svb, svh, svl, sgb, sgh, sgl, smb, smh, smq, smk,
    sdkb, sdkh, sdkl, sdvb, sdvh, sdvl,
    heads, num_queries, num_keys, dim, dim_v, factor, scale,
    OWN: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys: of key, value and policy."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    n, d, dv = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    here = n < num_keys
    Q, K, V = (
        Q + image * sqb + head * sqh,
        K + image * skb + head * skh,
        V + image * svb + head * svh,
    )
    M, G = M + image * smb + head * smh, G + image * sgb + head * sgh
    row = tl.program_id(0).to(tl.int64) * num_queries
    kept = tl.load(P + image * num_keys + n, mask=here, other=0.0) > 0.5
    k = tl.load(
        K + n[None, :] * skl + d[:, None], mask=here[None, :] & (d < dim)[:, None], other=0.0
    )
    v = tl.load(
        V + n[None, :] * svl + dv[:, None], mask=here[None, :] & (dv < dim_v)[:, None], other=0.0
    )
    k, v = _finite(k, kept[None, :]), _finite(v, kept[None, :])
    grad_k = tl.zeros([BN, BD], tl.float32)
    grad_v = tl.zeros([BN, BV], tl.float32)
    grad_policy = tl.zeros([BN], tl.float32)
    for start in range(0, num_queries, BM):
        m = start + tl.arange(0, BM)
        rows = m < num_queries
        q = tl.load(
            Q + m[:, None] * sql + d[None, :], mask=rows[:, None] & (d < dim)[None, :], other=0.0
        )
        g = tl.load(
            G + m[:, None] * sgl + dv[None, :],
            mask=rows[:, None] & (dv < dim_v)[None, :],
            other=0.0,
        )
        lse = tl.load(LSE + row + m, mask=rows, other=float("inf"))
        drift = tl.load(DRIFT + row + m, mask=rows, other=0.0)
        s = _logits(q, k, M, m, n, num_queries, num_keys, smq, smk, factor, MASK, PRECISION)
        weights = _weights(s, lse[:, None])
        flow = weights * (tl.dot(g, v, input_precision=PRECISION) - drift[:, None])
        seen = tl.broadcast_to(kept[None, :], (BM, BN))
        if OWN:
            own = m[:, None] == n[None, :]
            seen = seen | own
            grad_policy += tl.sum(tl.where(own, 0.0, flow), 0)
        else:
            grad_policy += tl.sum(flow, 0)
        weights = tl.where(seen, weights, 0.0).to(g.dtype)
        flow = tl.where(seen, flow, 0.0).to(q.dtype)
        grad_v += tl.dot(tl.trans(weights), g, input_precision=PRECISION)
        grad_k += tl.dot(tl.trans(flow), q, input_precision=PRECISION)
    to_k = DK + image * sdkb + head * sdkh + n[:, None] * sdkl + d[None, :]
    to_v = DV + image * sdvb + head * sdvh + n[:, None] * sdvl + dv[None, :]
    tl.store(
        to_k, (grad_k * scale).to(DK.dtype.element_ty), mask=here[:, None] & (d < dim)[None, :]
    )
    tl.store(to_v, grad_v.to(DV.dtype.element_ty), mask=here[:, None] & (dv < dim_v)[None, :])
    # What a dropped token holds teaches nothing where it makes this inf or NaN.
    grad_policy = tl.where(kept | (tl.abs(grad_policy) < float("inf")), grad_policy, 0.0)
    tl.store(DP + tl.program_id(0).to(tl.int64) * num_keys + n, grad_policy, mask=here)


@triton.jit
@no_type_check
def _backward_queries(
    Q, K, V, P, M, G, OUT, LSE, DRIFT, DQ,
    sqb, sqh, sql, skb, skh, skl, svb, svh, svl, sgb, sgh, sgl, sob, soh, sol,
    smb, smh, smq, smk, sdqb, sdqh, sdql,
    heads, num_queries, num_keys, dim, dim_v, factor, scale,
    OWN: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, and `DRIFT`, <g, o> of each, for `_backward_keys`."""
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    m, d, dv = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    rows = m < num_queries
    Q, K, V = (
        Q + image * sqb + head * sqh,
        K + image * skb + head * skh,
        V + image * svb + head * svh,
    )
    M, G = M + image * smb + head * smh, G + image * sgb + head * sgh
    OUT += image * sob + head * soh
    row = tl.program_id(0).to(tl.int64) * num_queries
    inside = rows[:, None] & (dv < dim_v)[None, :]
    q = tl.load(
        Q + m[:, None] * sql + d[None, :], mask=rows[:, None] & (d < dim)[None, :], other=0.0
    )
    g = tl.load(G + m[:, None] * sgl + dv[None, :], mask=inside, other=0.0)
    out = tl.load(OUT + m[:, None] * sol + dv[None, :], mask=inside, other=0.0)
    lse = tl.load(LSE + row + m, mask=rows, other=float("inf"))
    drift = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(DRIFT + row + m, drift, mask=rows)
    grad_q = tl.zeros([BM, BD], tl.float32)
    for start in range(0, num_keys, BN):
        n = start + tl.arange(0, BN)
        here = n < num_keys
        kept = tl.load(P + image * num_keys + n, mask=here, other=0.0) > 0.5
        k = tl.load(
            K + n[None, :] * skl + d[:, None], mask=here[None, :] & (d < dim)[:, None], other=0.0
        )
        v = tl.load(
            V + n[None, :] * svl + dv[:, None],
            mask=here[None, :] & (dv < dim_v)[:, None],
            other=0.0,
        )
        k, v = _finite(k, kept[None, :]), _finite(v, kept[None, :])
        s = _logits(q, k, M, m, n, num_queries, num_keys, smq, smk, factor, MASK, PRECISION)
        flow = _weights(s, lse[:, None])
        flow *= tl.dot(g, v, input_precision=PRECISION) - drift[:, None]
        seen = kept[None, :]
        if OWN:
            seen = seen | (m[:, None] == n[None, :])
        flow = tl.where(seen, flow, 0.0).to(k.dtype)
        grad_q += tl.dot(flow, tl.trans(k), input_precision=PRECISION)
    to = DQ + image * sdqb + head * sdqh + m[:, None] * sdql + d[None, :]
    tl.store(to, (grad_q * scale).to(DQ.dtype.element_ty), mask=rows[:, None] & (d < dim)[None, :])


def tiles(which: str, length: int, dim: int, wide: bool) -> Tiles:
    """Launch sizes of a kernel: `forward`, `keys` or `queries` (the two of the backward)."""
    if wide or dim > 128:
        return Tiles(32, 32, 4, 1)
    if which == "forward":
        return Tiles(128 if length > 128 else 64, 64, 4, 3)
    if which == "keys":
        return Tiles(32, 128, 4, 2) if length > 128 else Tiles(64, 64, 4, 2)
    return Tiles(64, 32, 4, 3)


def _common(
    q: Tensor, v: Tensor, mask: Tensor | None, own: bool
) -> tuple[dict[str, Any], tuple[int, ...]]:
    precision = "tf32" if q.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    padded = {
        "BD": max(16, triton.next_power_of_2(q.shape[-1])),
        "BV": max(16, triton.next_power_of_2(v.shape[-1])),
    }
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    return {"OWN": own, "MASK": kind, "PRECISION": precision, **padded}, strides


def _launch(
    kernel: Any, which: str, q: Tensor, k: Tensor, along_keys: bool, *args: Any, **how: Any
) -> None:
    length = k.shape[2] if along_keys else q.shape[2]
    tile = tiles(which, length, max(how["BD"], how["BV"]), q.dtype == torch.float32)
    size = tile.keys if along_keys else tile.queries
    grid = (q.shape[0] * q.shape[1], triton.cdiv(length, size))
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    sizes = {"BM": tile.queries, "BN": tile.keys, "BD": how.pop("BD"), "BV": how.pop("BV")}
    launch(kernel, grid, *args, options=options, **how, **sizes)


def _rows(x: Tensor) -> Tensor:
    """`x` with channels next to each other, which the kernels rely on."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: Tensor,
    mask: Tensor | None,
    scale: float,
    own_key: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Lq, dv] and log-sum-exp [B, H, Lq] in units of log 2.

    Operands are [B, H, L, d], the policy [B, Lk], the mask [B, H, Lq, Lk] of any strides.
    """
    q, k, v = map(_rows, (query, key, value))
    batch, heads, num_queries, dim = q.shape
    num_keys, dim_v = v.shape[2:]
    out = q.new_empty(batch, num_queries, heads, dim_v).transpose(1, 2)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    how, strides = _common(q, v, mask, own_key)
    _launch(
        _forward, "forward", q, k, False,
        q, k, v, policy.contiguous(), q if mask is None else mask, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *strides,
        heads, num_queries, num_keys, dim, dim_v, scale * LOG2E, **how,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    own_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of the policy [B, H, Lk] by head, in fp32."""
    q, k, v, g, o = map(_rows, (query, key, value, grad, out))
    batch, heads, num_queries, dim = q.shape
    num_keys, dim_v = v.shape[2:]
    drift = torch.empty_like(lse)
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    grad_policy = q.new_empty(batch, heads, num_keys, dtype=torch.float32)
    how, strides = _common(q, v, mask, own_key)
    policy, given = policy.contiguous(), q if mask is None else mask
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3])
    sizes = (heads, num_queries, num_keys, dim, dim_v, scale * LOG2E, scale)
    _launch(
        _backward_queries, "queries", q, k, False,
        q, k, v, policy, given, g, o, lse, drift, grad_q,
        *inputs, *o.stride()[:3], *strides, *grad_q.stride()[:3], *sizes, **how,
    )  # fmt: skip
    _launch(
        _backward_keys, "keys", q, k, True,
        q, k, v, policy, given, g, lse, drift, grad_k, grad_v, grad_policy,
        *inputs, *strides, *grad_k.stride()[:3], *grad_v.stride()[:3], *sizes, **how,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_policy
