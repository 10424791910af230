"""Scaled dot-product attention to the kept tokens, with a gradient to the decision."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenprune.errors import LeakError
from tokenprune.ops._fused import MappableAttention, MaskedAttention
from tokenprune.ops.align import autocast_dtype
from tokenprune.ops.kernels.attention import can_fuse, fused_attention
from tokenprune.ops.pooling import hide_dropped
from tokenprune.ops.softmax import masked_softmax
from tokenprune.private import transforms_active

__all__ = ["hide_dropped", "masked_attention", "masked_softmax"]


def masked_attention(
    query: Float[Tensor, "Bq *Hq Lq d"],
    key: Float[Tensor, "Bk *Hk Lk d"],
    value: Float[Tensor, "Bv *Hv Lk dv"],
    policy: Float[Tensor, "B Lp"] | None,
    *,
    attn_mask: Shaped[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    own_key: bool = True,
) -> Float[Tensor, "B *H Lq dv"]:
    """`F.scaled_dot_product_attention` in which each query sees the kept keys and its own.

    The forward pass is exact: the softmax runs over the kept keys and, with `own_key`, the
    query's own, so a kept row is what it would be had the dropped tokens been removed, whatever
    they hold. A row that sees nothing is 0. `query`, `key`, `value` and
    `attn_mask` get the gradient of that. The policy gets the straight-through gradient

        dL/dD_j = sum_{heads, i != j} exp(min(a_ij - lse_i, 0)) * <g_i, v_j - o_i>

    with a the scaled logits plus mask, lse_i their log-sum-exp over the visible keys, o the output
    and g its gradient (i = j counts too without `own_key`).

    Runs the fused kernel forward, and backward recomputes the logits of a few heads at a time: no
    tensor [B, H, Lq, Lk] is kept for backward. With `dropout_p` above 0 the noise must be part of
    the graph, so attention is not fused and its probabilities are kept.

    Args:
        query: at least rank 3: batch, any number of head dims, length, channels.
        key: as `query`; batch and head dims may be 1 and broadcast.
        value: as `key`.
        policy: 1 keeps, 0 drops; None is `scaled_dot_product_attention` itself.
        attn_mask: bool (True is visible) or float (added to the logits), of any shape that
            broadcasts to [B, H, Lq, Lk]. What it hides stays hidden, the own key included.
        dropout_p: of the attention probabilities.
        is_causal: hide later keys.
        scale: of the logits; None for d ** -0.5.
        enable_gqa: heads of `key` and `value` are shared by groups of query heads.
        own_key: query i is token i and sees its own key even if the policy drops it. Needs
            Lq = Lk. False for class attention, attention pooling, cross attention.

    Raises:
        LeakError: the policy does not fit the keys, or `own_key` does not fit Lq.
    """
    if policy is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    low = autocast_dtype(query.device)
    if low is not None and query.dtype != torch.float64:  # as autocast runs this function
        query, key, value = query.to(low), key.to(low), value.to(low)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    leading = _leading(query, key, value)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    _check(policy, leading, num_queries, num_keys, own_key)
    mask = None if attn_mask is None else _mask_4d(attn_mask, leading)
    if is_causal:
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril()
        if mask is None or mask.dtype == torch.bool:
            mask = causal[None, None] if mask is None else mask & causal
        else:
            mask = torch.where(causal, mask, float("-inf"))
    q, k, v = (_of_one_head_dim(x, leading) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p > 0:
        out = _unfused(q, k, v, policy, mask, dropout_p, scale, own_key)
    elif can_fuse(q, v, mask):
        square = (*q.shape[:2], num_queries, num_keys)
        mask = None if mask is None else mask.expand(square)
        out = fused_attention(q, k, v, policy, mask, scale, own_key)
    else:
        given = q, k, v, policy, mask, scale, own_key
        mapped = transforms_active()
        out = MappableAttention.apply(*given)[0] if mapped else MaskedAttention.apply(*given)
    return out.reshape(*leading, *out.shape[-2:])


def _leading(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Images and heads that the operands broadcast to."""
    shapes = [x.shape[:-2] for x in (query, key, value)]
    if shapes[0] == shapes[1] == shapes[2]:  # broadcast_shapes is Python, and slow
        return shapes[0]
    found: tuple[int, ...] = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return found


def _of_one_head_dim(x: Tensor, leading: tuple[int, ...]) -> Float[Tensor, "B H L d"]:
    # Dynamo wants three tensors where a host passes one as keys and values.
    if len(leading) == 2 and x.shape[:-2] == leading and not torch.compiler.is_compiling():
        return x
    heads = math.prod(leading[1:])  # not -1: there may be no image
    return x.expand(*leading, *x.shape[-2:]).reshape(leading[0], heads, *x.shape[-2:])


def _check(
    policy: Tensor, leading: tuple[int, ...], num_queries: int, num_keys: int, own_key: bool
) -> None:
    if tuple(policy.shape) != (leading[0], num_keys):
        raise LeakError(
            f"the policy must have the shape [{leading[0]}, {num_keys}] (images, keys), found "
            f"{list(policy.shape)}; the keys are not this policy's tokens. Pass the policy of the "
            "keys"
        )
    if own_key and num_queries != num_keys:
        raise LeakError(
            f"own_key=True says that query i is token i, found {num_queries} queries and "
            f"{num_keys} keys; pass own_key=False"
        )


def _mask_4d(mask: Shaped[Tensor, "..."], leading: tuple[int, ...]) -> Shaped[Tensor, "b h q k"]:
    """The host's mask with its head dims merged; broadcast dims stay 1 where possible."""
    mask = mask.reshape((1,) * (len(leading) + 2 - mask.ndim) + tuple(mask.shape))
    heads = tuple(mask.shape[1:-2])
    if len(leading) != 2 and any(size != 1 for size in heads):
        heads = leading[1:]
        mask = mask.expand(mask.shape[0], *heads, *mask.shape[-2:])
    return mask.reshape(mask.shape[0], math.prod(heads), *mask.shape[-2:])


def _unfused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    own: bool,
) -> Tensor:
    """Attention with dropout on the probabilities."""
    scores = (query * scale) @ hide_dropped(key, policy, 2).mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = masked_softmax(scores, policy, -1, query_dim=-2 if own else None, dtype=wide)
    return F.dropout(probabilities, dropout_p).to(value.dtype) @ hide_dropped(value, policy, 2)
