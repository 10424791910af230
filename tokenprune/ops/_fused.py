"""The fused attention kernel under a policy, and its backward pass in slices.

Operands are [B, H, L, d]; `attention.py` brings them into that form.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from tokenprune.ops.align import dropped_along, finite_if_dropped, is_kept, no_autocast
from tokenprune.private import transforms_active

__all__ = ["MappableAttention", "MaskedAttention"]

# Where torch.func has the mapped dim of each argument.
Dims = tuple[int | None, ...]
# Query, key, value, policy, mask, output, finite factors of key and value.
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]

# A dropped token with a larger norm is zeroed; below it logits and products of fp32 stay finite.
_LARGEST = 1e18
# Entries of a slice of logits. On CPU a slice should fit in the cache; elsewhere, and where a
# compiler would unroll the loop, it only has to be smaller than the activations.
_SLICE_CPU = 1 << 19
_SLICE = 1 << 26
# bmm of low-precision factors with an fp32 result: torch 2.8 and later, CUDA.
_BMM_WIDENS = hasattr(torch.ops.aten.bmm, "dtype_out") and torch.version.hip is None
# exp() of this is finite in fp32, and no log-sum-exp exceeds its row's maximum by as much.
_FAR = 80.0


def _finite_factor(
    x: Float[Tensor, "B H L d"], policy: Float[Tensor, "B L"]
) -> Float[Tensor, "B 1 L 1"]:
    """The factor of each token in `_sanitize`: 0 for dropped tokens with inf, NaN or huge values.

    A kernel hides a key by adding -inf to its logit and weighs its value with 0; both give NaN if
    key or value is not finite. A kept token that holds inf or NaN gets NaN, any other token 1.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # One norm over all heads of a token; no cast where the dtype is wide already.
    norm = torch.linalg.vector_norm(
        x, dim=(1, 3), keepdim=True, dtype=None if x.dtype == wide else wide
    )
    factor = torch.where(dropped_along(policy, 4, 2), (norm < _LARGEST).to(wide), norm * 0 + 1)
    return factor.to(x.dtype)


def _sanitize(
    x: Float[Tensor, "b h L d"], factor: Float[Tensor, "b 1 L 1"]
) -> Float[Tensor, "b h L d"]:
    """Zero the tokens whose `_finite_factor` is 0 and keep the others.

    By arithmetic, because boolean masks cost several times as much on CPU.
    """
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).mul_(factor)


def _additive(mask: Shaped[Tensor, "b h q k"], dtype: torch.dtype) -> Float[Tensor, "b h q k"]:
    """A mask in the form that is added to the logits: 0 where a bool is true, else -inf."""
    return torch.where(mask, 0.0, -math.inf).to(dtype) if mask.dtype == torch.bool else mask


def _slices(batch: int, heads: int, square: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Images and heads with at most `entries` logits per slice, `square` of each head.

    A slice has at least one head.
    """
    if batch * heads * square <= entries:
        # No loop: a compiler would specialize it to this batch size.
        yield slice(None), slice(None)
        return
    images = max(entries // (heads * square), 1)
    count = min(max(entries // square, 1), heads)
    for image in range(0, batch, images):
        for head in range(0, heads, count):
            yield slice(image, min(image + images, batch)), slice(head, min(head + count, heads))


def _part(mask: Shaped[Tensor, "b h q k"], images: slice, heads: slice) -> Tensor:
    """A slice of a mask whose dims may be 1 and broadcast."""
    everything = slice(None)
    return mask[
        images if mask.shape[0] > 1 else everything, heads if mask.shape[1] > 1 else everything
    ]


def _kernel(
    query: Float[Tensor, "B H Lq d"],
    key: Float[Tensor, "B H Lk d"],
    value: Float[Tensor, "B H Lk dv"],
    policy: Float[Tensor, "B Lk"],
    mask: Shaped[Tensor, "b h q k"] | None,
    scale: float,
    own_key: bool,
) -> Float[Tensor, "B H Lq dv"]:
    """`scaled_dot_product_attention` under the policy's and the host's mask together.

    `key` and `value` are sanitized. The joint mask has no head dim unless the host's has one; if it
    is large, the batch is processed in slices.
    """
    host = None if mask is None else _additive(mask, query.dtype)
    kept = is_kept(policy)[:, None, None]
    per_image = query.shape[2] * key.shape[2] * (1 if mask is None else mask.shape[1])
    parts = []
    for images, _ in _slices(query.shape[0], 1, per_image, _SLICE):
        hiding = _additive(kept[images], query.dtype)
        joint = hiding.expand(-1, 1, query.shape[2], -1).contiguous()
        if own_key:
            joint.diagonal(dim1=2, dim2=3).zero_()
        if host is not None:
            joint = joint + _part(host, images, slice(None)).to(query.dtype)
        out = scaled_dot_product_attention(
            query[images], key[images], value[images], attn_mask=joint, scale=scale
        )
        if host is not None or not own_key:
            # Backends differ in a row that sees nothing.
            out = out.masked_fill(joint.amax(-1, keepdim=True) == -math.inf, 0)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: Tensor,
    mask: Tensor | None,
    scale: float,
    own_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the finite factors of key and value for the backward pass."""
    with no_autocast(query.device):
        factors = _finite_factor(key, policy), _finite_factor(value, policy)
        finite = _sanitize(key, factors[0]), _sanitize(value, factors[1])
        return _kernel(query, *finite, policy, mask, scale, own_key), *factors


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *operands, ctx.scale, ctx.own_key = inputs
    # Not the sanitized copies: the originals are mostly views of tensors that are kept anyway.
    ctx.save_for_backward(*operands, *outputs)


class MaskedAttention(torch.autograd.Function):
    """`masked_attention` for operands of one head dim; differentiable once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _outputs(*inputs)
        _save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        given = grad, *ctx.saved_tensors, ctx.scale, ctx.own_key, ctx.needs_input_grad[4]
        mapped = transforms_active()
        return *(_Gradients.apply(*given) if mapped else _Gradients.forward(*given)), None, None


class MappableAttention(MaskedAttention):
    """The same for torch.func; plain calls are spared what it costs."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return _outputs(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
        """The mapped dim joins the images."""
        return _as_images(MappableAttention, info.batch_size, in_dims, inputs), (0, 0, 0)


class _Gradients(torch.autograd.Function):
    """The backward pass, as a function so that torch.func can map it."""

    @staticmethod
    def forward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        policy: Tensor,
        mask: Tensor | None,
        out: Tensor,
        key_factor: Tensor,
        value_factor: Tensor,
        scale: float,
        own_key: bool,
        needs_mask: bool,
    ) -> tuple[Tensor | None, ...]:
        saved = query, key, value, policy, mask, out, key_factor, value_factor
        with no_autocast(grad.device):
            return _backward(saved, grad, scale, own_key, needs_mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is kept: `MaskedAttention` is differentiable once."""

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *inputs: Any) -> tuple[Any, Any]:
        *rest, grad_mask = _as_images(_Gradients, info.batch_size, in_dims, inputs)
        if grad_mask is not None and _images(inputs[5], in_dims[5]) == 1:
            grad_mask = grad_mask.sum(1, keepdim=True)
        return (*rest, grad_mask), (0, 0, 0, 0, None if grad_mask is None else 0)


def _as_images(function: Any, size: int, in_dims: Dims, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run a function whose tensors have the images first with `size` times as many images."""
    batch = _images(inputs[0], in_dims[0])

    def joined(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.expand(size, batch, *x.shape[2:]).flatten(0, 1)  # one mask may serve all images

    def apart(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(size, batch, *x.shape[1:])

    return tuple(map(apart, function.apply(*map(joined, inputs, in_dims))))


def _images(x: Tensor, dim: int | None) -> int:
    """How many images an argument has beside the mapped dim."""
    return int(x.shape[0] if dim is None else x.movedim(dim, 0).shape[1])


def _backward(
    saved: Saved, grad: Tensor, scale: float, own_key: bool, needs_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value, policy and mask."""
    query, key, value, policy, mask, out, key_factor, value_factor = saved
    batch, heads, num_queries, num_keys = *query.shape[:3], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    narrow = _factor_dtype(query)
    grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
    grad_policy = policy.new_zeros(policy.shape, dtype=wide)
    grad_mask = torch.zeros_like(mask, dtype=wide) if mask is not None and needs_mask else None
    host = None if mask is None else _additive(mask, wide)
    kept = is_kept(policy)[:, None, None]
    hiding, showing = _additive(kept, wide), kept.to(wide)

    small = query.device.type == "cpu" and not torch.compiler.is_compiling()
    entries = _SLICE_CPU if small else _SLICE
    weights = other = query.new_empty(0)
    for here in _slices(batch, heads, num_queries * num_keys, entries):
        images = here[0]
        q, o, g = (x[here].to(narrow) for x in (query, out, grad))
        k = _sanitize(key[here], key_factor[images]).to(narrow)
        v = _sanitize(value[here], value_factor[images]).to(narrow)
        # Two preallocated buffers, reused by every slice: allocation costs as much as filling them.
        shape = (q.shape[0], q.shape[1], num_queries, num_keys)
        if weights.shape != shape:
            weights, other = q.new_empty(shape, dtype=wide), q.new_empty(shape, dtype=wide)

        q = q * scale
        _multiply(q, k.mT, weights)
        if host is not None:
            weights += _part(host, *here)
        # Relative to the largest visible logit; a hidden one may exceed it by any amount.
        _visible(torch.add, weights, hiding[images], other, own_key)
        highest = other.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
        weights.sub_(highest).clamp_(max=_FAR).exp_()
        _visible(torch.mul, weights, showing[images], other, own_key)
        total = other.sum(-1, keepdim=True)
        total = total + (total == 0)  # a row that sees nothing
        # The gradient, a smaller tensor, is divided by `total` instead of the weights, except in
        # low precision, where it could leave the range.
        if narrow != wide:
            weights /= total
            other /= total
            total = torch.ones_like(total)
        baseline = (g.to(wide) * o).sum(-1, keepdim=True) / total
        g = (g / total).to(narrow)
        _multiply(other.to(narrow).mT, g, grad_value[here])
        _multiply(g, v.mT, other)
        other.sub_(baseline).mul_(torch.minimum(weights, total, out=weights))
        grad_policy[images] += _column_sums(other, own_key)
        _visible(torch.mul, other, showing[images], weights, own_key)
        if grad_mask is not None:
            part = _part(grad_mask, *here)
            part += weights.sum_to_size(part.shape)
        grad_logits = weights.to(narrow)
        _multiply(grad_logits, k * scale, grad_query[here])
        _multiply(grad_logits.mT, q, grad_key[here])

    if grad_mask is not None and mask is not None:
        grad_mask = grad_mask.to(mask.dtype)
    return grad_query, grad_key, grad_value, finite_if_dropped(grad_policy, policy), grad_mask


def _factor_dtype(query: Float[Tensor, "B H Lq d"]) -> torch.dtype:
    """The dtype of the factors of matrix products; low precision is slower without CUDA."""
    return query.dtype if query.is_cuda else torch.promote_types(query.dtype, torch.float32)


def _multiply(
    left: Float[Tensor, "b h m k"], right: Float[Tensor, "b h k n"], out: Float[Tensor, "b h m n"]
) -> None:
    """Batched matrix product into `out`, which may have a wider or narrower dtype."""
    if torch.compiler.is_compiling():  # it refuses an `out` that is a view
        wide = torch.promote_types(left.dtype, out.dtype)
        out.copy_(left.to(wide) @ right.to(wide))
    elif left.dtype == out.dtype:
        torch.matmul(left, right, out=out)
    elif left.dtype.itemsize > out.dtype.itemsize:
        out.copy_(left @ right)
    elif left.is_cuda and _BMM_WIDENS:
        flat = left.flatten(0, 1), right.flatten(0, 1)
        torch.bmm(*flat, out_dtype=out.dtype, out=out.flatten(0, 1))
    else:
        torch.matmul(left.to(out.dtype), right.to(out.dtype), out=out)


def _visible(
    operation: Callable[..., Tensor],
    x: Float[Tensor, "b h q k"],
    row: Float[Tensor, "b 1 1 k"],
    out: Float[Tensor, "b h q k"],
    own_key: bool,
) -> None:
    """`operation(x, row)` into `out`, but `x` itself at each query's own key."""
    operation(x, row, out=out)
    if own_key:
        out.diagonal(dim1=2, dim2=3).copy_(x.diagonal(dim1=2, dim2=3))


def _column_sums(x: Float[Tensor, "b h q k"], own_key: bool) -> Float[Tensor, "b k"]:
    """Sum over heads and queries, without each key's own query if `own_key`."""
    sums = x.sum((1, 2))
    return sums - x.diagonal(dim1=2, dim2=3).sum(1) if own_key else sums
