"""Softmax over the kept keys, with a gradient to the decision that dropped the others."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenprune.errors import LeakError
from tokenprune.ops.align import diagonal, dropped_along, finite_if_dropped, token_dim
from tokenprune.private import transforms_active

__all__ = ["masked_softmax"]


def masked_softmax(
    scores: Float[Tensor, "B ..."],
    policy: Float[Tensor, "B Lk"] | None,
    dim: int = -1,
    *,
    query_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B ..."]:
    """Softmax over the visible keys: kept ones and, with `query_dim`, each query's own.

    Hidden keys get exactly 0, and their scores, inf and NaN included, are not read. A row with no
    visible key is 0, as in `scaled_dot_product_attention`. Scores get the gradient of this
    exact softmax. The policy gets a straight-through one: with G = dL/dp, s the scores and lse_i
    the log-sum-exp over the visible keys of row i,

        dL/dD_j = sum_i exp(min(s_ij - lse_i, 0)) * (G_ij - sum_k p_ik G_ik),

    summed over all rows i of the image, with `query_dim` except the key's own. For a kept key this
    is the derivative of `D_j e^{s_ij} / sum_k D_k e^{s_ik}`; for a dropped one the weight is what
    it would be if the key were visible, and at most 1.

    Keeps one more tensor of the size of `scores` for the backward pass than softmax does, unless
    the policy needs no gradient.

    Args:
        scores: logits of rank 2 or more, the batch at dim 0.
        policy: 1 keeps, 0 drops; None is a plain softmax.
        dim: the key dim of `scores`.
        query_dim: the dim along which query i is token i, with as many entries as `dim`; each query
            then sees its own key even if it is dropped. None if queries are not these tokens.
        dtype: cast the scores to this first, as in `torch.softmax`.

    Returns:
        Probabilities of the shape of `scores`, in the dtype that `torch.softmax` would give.

    Raises:
        LeakError: `dim` does not hold the policy's tokens, or `query_dim` not as many.
    """
    if policy is None:
        return torch.softmax(scores, dim, dtype=dtype)
    dim = token_dim(scores, policy, dim)
    if query_dim is not None:
        query_dim = query_dim % scores.ndim
        if query_dim in (0, dim) or scores.shape[query_dim] != scores.shape[dim]:
            raise LeakError(
                f"query_dim={query_dim} says that query i is token i, found scores of shape "
                f"{tuple(scores.shape)} with keys along dim {dim}; pass query_dim=None"
            )
    if dtype is None:  # whether autocast runs softmax in fp32 depends on the backend
        dtype = torch.softmax(scores.new_zeros(1), 0).dtype
    given = scores, policy, dim, query_dim, dtype
    if transforms_active():
        return _MappableSoftmax.apply(*given)[0]  # type: ignore[no-any-return]
    return _MaskedSoftmax.apply(*given)  # type: ignore[no-any-return]


def _probabilities(
    scores: Tensor,
    policy: Tensor,
    dim: int,
    query_dim: int | None,
    dtype: torch.dtype,
    *,
    teaches: bool = True,
) -> tuple[Tensor, Tensor]:
    """The probabilities; and, if the policy `teaches`, the weights that hidden keys would have."""
    hidden = dropped_along(policy, scores.ndim, dim)
    if query_dim is not None:
        hidden = hidden & torch.logical_not(diagonal(scores, dim, query_dim))
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    visible = scores.masked_fill(hidden, float("-inf"))
    empty = visible.amax(dim, keepdim=True) == float("-inf")
    exact = torch.softmax(visible, dim).masked_fill(empty, 0)
    probabilities = exact.to(dtype)
    if not teaches:
        return probabilities, probabilities
    weights = torch.where(hidden, weight_if_visible(scores, visible, dim), exact).to(dtype)
    return probabilities, weights


def _save(ctx: Any, inputs: tuple[Any, ...], weights: Tensor) -> None:
    scores, policy, ctx.dim, ctx.query_dim, _ = inputs
    ctx.scores_dtype = scores.dtype
    ctx.save_for_backward(weights, policy)


class _MaskedSoftmax(torch.autograd.Function):
    """See `masked_softmax`. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        probabilities, weights = _probabilities(*inputs, teaches=ctx.needs_input_grad[1])
        _save(ctx, inputs, weights)
        return probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        weights, policy = ctx.saved_tensors
        dim, query_dim = ctx.dim, ctx.query_dim
        wide = torch.promote_types(weights.dtype, torch.float32)
        grad, weights = given.to(wide), weights.to(wide)
        hidden = dropped_along(policy, weights.ndim, dim)
        if query_dim is not None:
            own = diagonal(weights, dim, query_dim)
            hidden = hidden & torch.logical_not(own)
        # Not a product with 0: a dropped token's contents may have made `grad` inf or NaN there.
        baseline = (weights * grad).masked_fill(hidden, 0).sum(dim, keepdim=True)
        flow = weights * (grad - baseline)
        grad_scores = grad_policy = None
        if ctx.needs_input_grad[0]:
            grad_scores = flow.masked_fill(hidden, 0).to(ctx.scores_dtype)
        if ctx.needs_input_grad[1]:
            others = flow if query_dim is None else flow.masked_fill(own, 0)
            summed = [d for d in range(1, weights.ndim) if d != dim]
            # sum() over an empty list of dims would sum over all of them
            grad_policy = finite_if_dropped(others.sum(summed) if summed else others, policy)
        return grad_scores, grad_policy, None, None, None


class _MappableSoftmax(_MaskedSoftmax):
    """The same for torch.func; plain calls are spared what it costs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _probabilities(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        _save(ctx, inputs, output[1])


def weight_if_visible(
    scores: Float[Tensor, "..."], visible: Float[Tensor, "..."], dim: int
) -> Float[Tensor, "..."]:
    """`exp(min(s_ij - lse_i, 0))`: the weight that a hidden key would have if it were visible.

    `visible` is `scores` with -inf at hidden keys. In a row without visible keys every finite score
    has the weight 1. NaN, as from a score of -inf in such a row, becomes 0.
    """
    lse = torch.logsumexp(visible, dim, keepdim=True)
    return torch.nan_to_num(torch.exp((scores - lse).clamp_max(0)), nan=0.0)
