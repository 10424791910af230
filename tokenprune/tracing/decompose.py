"""torch's own modules that mix tokens, in plain operations so that their mixing can be masked."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["DECOMPOSED"]


def multihead_attention(
    module: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, None]:
    """`nn.MultiheadAttention.forward` for batched input, without the attention weights.

    The weights are not formed: hosts that read them fail by name instead of getting a wrong value.
    """
    unsupported = module.bias_k is not None or module.add_zero_attn or key_padding_mask is not None
    if unsupported or query.dim() != 3:
        raise NotImplementedError(
            "nn.MultiheadAttention with bias_k, add_zero_attn, key_padding_mask or unbatched input"
        )
    packed, shared = query is key and key is value, key is value
    if module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if module.in_proj_weight is None:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        projected = _projected((query, key, value), weights, module.in_proj_bias)
    elif packed:
        projected = _projected((query,), [module.in_proj_weight], module.in_proj_bias)
    elif shared:
        rows = module.embed_dim  # of the query's projection; the others follow
        weights = [module.in_proj_weight[:rows], module.in_proj_weight[rows:]]
        projected = _projected((query, key), weights, module.in_proj_bias)
    else:
        weights = list(module.in_proj_weight.chunk(3))
        projected = _projected((query, key, value), weights, module.in_proj_bias)
    heads, width = module.num_heads, module.head_dim
    q, k, v = (t.reshape(*t.shape[:2], heads, width).permute(1, 2, 0, 3) for t in projected)
    dropout = module.dropout if module.training else 0.0
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # True hides, in this module
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, float("-inf"))
    if need_weights:
        mixed = _with_weights(q, k, v, attn_mask, dropout)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    output = module.out_proj(mixed.permute(2, 0, 1, 3).flatten(2))
    return (output.transpose(0, 1) if module.batch_first else output), None


def _with_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention as torch makes it where a host asks for its weights: no fused kernel, and heads
    folded into the batch."""
    batch, heads = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    q = q * math.sqrt(1.0 / q.shape[-1])
    if mask is None:
        scores = torch.bmm(q, k.transpose(-2, -1))
    else:
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        scores = torch.baddbmm(mask, q, k.transpose(-2, -1))
    weights = F.softmax(scores, dim=-1)
    if dropout > 0.0:
        weights = F.dropout(weights, p=dropout)
    mixed = torch.bmm(weights, v)
    return mixed.view(batch, heads, *mixed.shape[1:])


def _projected(
    inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> list[torch.Tensor]:
    """Query, key and value, [L, B, D] each, from one, two or three products as torch makes them:
    another number of products, or the batch first, would round otherwise now and then."""
    width = sum(weight.shape[0] for weight in weights) // 3
    parts: list[torch.Tensor] = []
    for given, weight in zip(inputs, weights, strict=True):
        first, rows = len(parts) * width, weight.shape[0]
        of_these = None if bias is None else bias[first : first + rows]
        parts.extend(F.linear(given, weight, of_these).chunk(rows // width, dim=-1))
    return parts


DECOMPOSED: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multihead_attention}
