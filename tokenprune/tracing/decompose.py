"""torch's own modules that mix tokens, in plain operations so that their mixing can be masked."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.notices import warn_once
from tokenprune.private import canonical_mask

__all__ = ["decomposed", "is_leaf", "is_torchs"]

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
    """`nn.MultiheadAttention.forward` without the attention weights.

    The weights are not formed: hosts that read them fail by name instead of getting a wrong value.
    """
    more_keys = module.bias_k is not None or module.add_zero_attn or key_padding_mask is not None
    if more_keys or query.dim() != 3 or (attn_mask is not None and attn_mask.dim() == 3):
        masks = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        return _step_by_step(module, query, key, value, need_weights, is_causal, masks), None
    if is_causal and not need_weights:
        attn_mask = None
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


def _step_by_step(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    need_weights: bool,
    is_causal: bool,
    masks: Mapping[str, Tensor | None],
) -> Tensor:
    """The same by torch's own function, which a trace goes through."""
    turn = module.batch_first and query.dim() == 3
    q, k, v = (t.transpose(0, 1) if turn else t for t in (query, key, value))
    packed = module._qkv_same_embed_dim
    own = {} if packed else {f"{n}_proj_weight": getattr(module, f"{n}_proj_weight") for n in "qkv"}
    options: dict[str, Any] = {"need_weights": need_weights, "is_causal": is_causal, **own, **masks}
    output, _ = F.multi_head_attention_forward(
        q, k, v, module.embed_dim, module.num_heads, module.in_proj_weight, module.in_proj_bias,
        module.bias_k, module.bias_v, module.add_zero_attn, module.dropout,
        module.out_proj.weight, module.out_proj.bias, training=module.training,
        use_separate_proj_weight=not packed, **options,
    )  # fmt: skip
    return output.transpose(0, 1) if turn else output


def encoder_layer(
    module: nn.TransformerEncoderLayer,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerEncoderLayer.forward` without its fused kernel."""
    how = _added(src, src_mask, src_key_padding_mask, "src_mask")
    if module.norm_first:
        x = src + module._sa_block(module.norm1(src), *how, is_causal=is_causal)
        return x + module._ff_block(module.norm2(x))
    x = module.norm1(src + module._sa_block(src, *how, is_causal=is_causal))
    return module.norm2(x + module._ff_block(x))  # type: ignore[no-any-return]


def encoder(
    module: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """`nn.TransformerEncoder.forward` without nested tensors, and without a look at what the mask
    holds: it hides what it hides."""
    if mask is None and src_key_padding_mask is not None and not module.layers[0].training:
        _say_padded_rows(module)
    mask, padding = _added(src, mask, src_key_padding_mask, "mask")
    how = {"src_mask": mask, "src_key_padding_mask": padding}
    for layer in module.layers:
        src = layer(src, is_causal=bool(is_causal), **how)
    return src if module.norm is None else module.norm(src)


def _say_padded_rows(module: nn.TransformerEncoder) -> None:
    """Warn where torch may put zeros: whether it does, what the mask holds decides, and autograd's
    mode."""
    if getattr(module, "use_nested_tensor", False) and torch.backends.mha.get_fastpath_enabled():
        warn_once(
            module,
            "padded rows",
            "With gradients off and the padding behind the tokens, an nn.TransformerEncoder in "
            "eval mode returns 0 in padded rows (enable_nested_tensor=True); in a wrapped model "
            "it returns what its layers make of them. Leave padded rows out of what is read from "
            "it, or make it with enable_nested_tensor=False: then both return the same.",
        )


def decoder(
    module: nn.TransformerDecoder,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """`nn.TransformerDecoder.forward`, without a look at what the mask holds."""
    how: dict[str, Any] = {"tgt_mask": tgt_mask, "memory_mask": memory_mask}
    how |= {"tgt_key_padding_mask": tgt_key_padding_mask}
    how |= {"memory_key_padding_mask": memory_key_padding_mask}
    how |= {"tgt_is_causal": bool(tgt_is_causal), "memory_is_causal": memory_is_causal}
    for layer in module.layers:
        tgt = layer(tgt, memory, **how)
    return tgt if module.norm is None else module.norm(tgt)


def _added(
    src: Tensor, mask: Tensor | None, padding: Tensor | None, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """The masks of an encoder as torch hands them on, to be added to scores: -inf for True."""
    padding = canonical_mask(
        mask=padding,
        mask_name="src_key_padding_mask",
        other_type=None if mask is None else mask.dtype,
        other_name=name,
        target_type=src.dtype,
    )
    mask = canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=None,
        other_name="",
        target_type=src.dtype,
        check_other=False,
    )
    return mask, padding


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


DECOMPOSED: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: multihead_attention,
    nn.TransformerEncoderLayer: encoder_layer,
    nn.TransformerEncoder: encoder,
    nn.TransformerDecoder: decoder,
}
FORWARDS = {kind: kind.forward for kind in DECOMPOSED}
TRACED_THROUGH = (nn.TransformerDecoderLayer, nn.Transformer)


def decomposed(module: nn.Module) -> Callable[..., Any] | None:
    """What stands for torch's forward of a module; None if it has another forward."""
    kind = type(module)
    base = next((base for base in kind.__mro__ if base in DECOMPOSED), None)
    if base is None or "forward" in vars(module) or kind.forward is not FORWARDS[base]:
        return None
    return DECOMPOSED[base]


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of a module is one node: the module itself runs, hooks included.

    A forward set on the object may do anything; accelerate's brings weights and runs the class's.
    """
    of_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
    opened = type(module) in (*DECOMPOSED, *TRACED_THROUGH)
    own = "forward" in vars(module) and "_hf_hook" not in vars(module)
    return of_torch and not (opened or own or isinstance(module, CONTAINERS))


def is_torchs(called: Any) -> bool:
    """Whether a function or module is torch's own, and runs no code of an owner."""
    of_torch = ("torch.nn.modules.", "torch.nn.functional")
    made_by = getattr(called, "__module__", None) or ""  # of a module that of its class
    return isinstance(called, BuiltinFunctionType) or made_by.startswith(of_torch)
