"""torch's own modules that mix tokens, in plain operations so that their mixing can be masked."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["decomposed", "is_leaf"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def multihead_attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """`nn.MultiheadAttention.forward` for batched input, without the attention weights.

    The weights are not formed: hosts that read them fail by name instead of getting a wrong value.
    """
    unsupported = module.bias_k is not None or module.add_zero_attn or key_padding_mask is not None
    if unsupported or query.dim() != 3:
        raise NotImplementedError(
            "nn.MultiheadAttention with bias_k, add_zero_attn, key_padding_mask or unbatched input"
        )
    given, weight, rows = [query, key, value], module.in_proj_weight, module.embed_dim
    if weight is None:
        weights: list[Tensor] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    elif query is key and key is value:
        given, weights = [query], [weight]
    elif key is value:
        given, weights = [query, key], [weight[:rows], weight[rows:]]
    else:
        weights = list(weight.chunk(3))
    if module.batch_first:
        given = [t.transpose(0, 1) for t in given]
    projected = _projected(given, weights, module.in_proj_bias)
    heads, width = module.num_heads, module.head_dim
    q, k, v = (t.reshape(*t.shape[:2], heads, width).permute(1, 2, 0, 3) for t in projected)
    dropout = module.dropout if module.training else 0.0
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # True hides, in this module
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, float("-inf"))
    if need_weights:
        mixed = _with_weights(q, k, v, attn_mask, dropout)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    last = module.out_proj  # its weights are read, the module itself never runs
    output = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), last.weight, last.bias)
    return (output.transpose(0, 1) if module.batch_first else output), None


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention as torch makes it where a host asks for its weights: not fused, heads in dim 0."""
    batch, heads = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    q = q * math.sqrt(1.0 / q.shape[-1])
    if mask is None:
        scores = torch.bmm(q, k.transpose(-2, -1))
    else:
        mask = mask.unsqueeze(0) if mask.dim() == 2 else mask
        scores = torch.baddbmm(mask, q, k.transpose(-2, -1))
    weights = F.softmax(scores, dim=-1)
    mixed = torch.bmm(F.dropout(weights, p=dropout) if dropout > 0.0 else weights, v)
    return mixed.view(batch, heads, *mixed.shape[1:])


def _projected(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None
) -> list[Tensor]:
    """Query, key and value, [L, B, D] each, from one, two or three products as torch makes them:
    another number of products, or the batch first, sometimes rounds differently."""
    width = sum(weight.shape[0] for weight in weights) // 3
    parts: list[Tensor] = []
    for given, weight in zip(inputs, weights, strict=True):
        first, rows = len(parts) * width, weight.shape[0]
        of_these = None if bias is None else bias[first : first + rows]
        parts.extend(F.linear(given, weight, of_these).chunk(rows // width, dim=-1))
    return parts


DECOMPOSED: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multihead_attention}
FORWARDS = {kind: kind.forward for kind in DECOMPOSED}


def decomposed(module: nn.Module) -> Callable[..., Any] | None:
    """What stands for torch's forward of a module; None if it has another forward."""
    kind = type(module)
    found = DECOMPOSED.get(kind)
    own = "forward" in vars(module) or found is None or kind.forward is not FORWARDS[kind]
    return None if own else found


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of a module is one node: the module itself runs, hooks included.

    A forward set on the object may do anything; accelerate's brings weights and runs the class's.
    """
    of_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
    own = "forward" in vars(module) and "_hf_hook" not in vars(module)
    plain = not isinstance(module, CONTAINERS) and type(module) not in DECOMPOSED
    return of_torch and plain and not own
