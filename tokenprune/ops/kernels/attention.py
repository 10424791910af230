"""Masked attention as operators that a compiler sees whole, and their gradient.

They compute what `tokenprune.ops.masked_attention` documents, without a tensor [Lq, Lk]. The
policy's gradient falls out of the tiles that the gradients of keys and values need: there the
weights `exp(min(a_ij - lse_i, 0))` are at hand for every key; dropped ones are hidden afterwards.
Unlike the plain version, a dropped token with inf or NaN is made finite channel by channel.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenprune.ops.kernels import define, kernels_run_on
from tokenprune.private import transforms_active

__all__ = ["can_fuse", "fused_attention"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor policy, Tensor? mask"


def can_fuse(query: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels serve these operands [B, H, L, d]."""
    return (
        kernels_run_on(query)
        and query.dtype in _DTYPES
        and max(query.shape[-1], value.shape[-1]) <= 256
        and min(query.numel(), value.numel()) > 0
        and not (mask is not None and mask.requires_grad)
    )


def _forward(*args: Any) -> Any:
    from tokenprune.ops.kernels import attention_triton

    return attention_triton.forward(*args)


def _backward(*args: Any) -> Any:
    from tokenprune.ops.kernels import attention_triton

    return attention_triton.backward(*args)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, policy: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=torch.float32)


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
    return *grads, query.new_empty(key.shape[:3], dtype=torch.float32)


_forward_operator = define(
    "masked_attention",
    f"({_OPERANDS}, float scale, bool own_key) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_operator = define(
    "masked_attention_backward",
    f"(Tensor grad, {_OPERANDS}, Tensor out, Tensor lse, float scale, bool own_key)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _fold(op: Any) -> Any:
    """The rule of `op` under vmap: the mapped dim joins the batch."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        def folded(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            moved = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return moved.flatten(0, 1)

        outs = op(*(folded(x, dim) for x, dim in zip(args, dims, strict=True)))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outs), (0,) * len(outs)

    return rule


for _each in (_forward_operator, _backward_operator):
    torch.library.register_vmap(_each.name(), _fold(_each))


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: Tensor,
    mask: Tensor | None,
    scale: float,
    own_key: bool,
) -> Tensor:
    """`masked_attention` of operands [B, H, L, d], a policy [B, Lk], and a mask [B, H, Lq, Lk] or
    None."""
    mapped = transforms_active() or torch.compiler.is_compiling()
    function = _MappableFused if mapped else _Fused
    out: Tensor = function.apply(query, key, value, policy, mask, scale, own_key)[0]
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, policy, mask, ctx.scale, ctx.own_key = inputs
    ctx.save_for_backward(query, key, value, policy, mask, *output)
    ctx.mark_non_differentiable(output[1])


@no_type_check  # Dynamo cannot look through the wrappers that tests put around annotated methods
class _Fused(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward_operator(*inputs)
        _save(ctx, inputs, (out, lse))
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *grads, by_head = _backward_operator(grad, *ctx.saved_tensors, ctx.scale, ctx.own_key)
        policy = ctx.saved_tensors[3]
        return *grads, by_head.sum(1).to(policy.dtype), None, None, None


@no_type_check
class _MappableFused(_Fused):
    """The same for torch.func and compilers; plain calls are spared what it costs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward_operator(*inputs)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)
