"""torch's own modules that mix tokens, in plain operations so that their mixing can be masked."""

from collections.abc import Callable
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
    if not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    heads, width = module.num_heads, module.head_dim
    q, k, v = (
        F.linear(t, w, b).reshape(*t.shape[:2], heads, width).transpose(1, 2)
        for t, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    dropout = module.dropout if module.training else 0.0
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    output = module.out_proj(mixed.transpose(1, 2).flatten(2))
    return (output if module.batch_first else output.transpose(0, 1)), None


DECOMPOSED: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multihead_attention}
