"""Sums, means and maxima over the kept tokens of each image.

None of them reads a dropped token, whatever it holds. A sum, mean or maximum over no token is 0. A
policy of None means that no token is dropped.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tokenprune.ops.align import along, dropped_along, is_kept, token_dim

__all__ = ["hide_dropped", "masked_amax", "masked_contraction_operand", "masked_mean", "masked_sum"]


def hide_dropped(
    x: Float[Tensor, "B ..."], policy: Float[Tensor, "B L"] | None, dim: int
) -> Float[Tensor, "B ..."]:
    """Replace inf and NaN of dropped tokens by 0 and keep everything else.

    Otherwise a contraction that gives a dropped token the weight 0 would compute 0 * inf = NaN.
    Gradients pass where values are unchanged; the policy gets none.

    Args:
        x: any tensor with the batch at dim 0.
        policy: 1 keeps, 0 drops; None returns `x` itself.
        dim: the token dim of `x`.

    Raises:
        LeakError: `dim` does not hold the policy's tokens.
    """
    if policy is None:
        return x
    finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    return torch.where(dropped_along(policy, x.ndim, token_dim(x, policy, dim)), finite, x)


def masked_contraction_operand(
    x: Float[Tensor, "B ..."], policy: Float[Tensor, "B L"] | None, dim: int
) -> Float[Tensor, "B ..."]:
    """`x_j * D_j`: dropped tokens are exactly 0 and the policy D gets the gradient of the product.

    Args:
        x: an operand of a contraction over tokens, the batch at dim 0.
        policy: 1 keeps, 0 drops; None returns `x` itself.
        dim: the token dim of `x`.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        LeakError: `dim` does not hold the policy's tokens.
    """
    if policy is None:
        return x
    dim = token_dim(x, policy, dim)
    return hide_dropped(x, policy, dim) * along(policy.to(x.dtype), x.ndim, dim)


def masked_sum(
    x: Shaped[Tensor, "B ..."], policy: Float[Tensor, "B L"] | None, dim: int, keepdim: bool = False
) -> Shaped[Tensor, "B ..."]:
    """Sum over the kept tokens: `sum_j D_j x_j`, added up in fp32 or better; whole numbers and
    flags in int64, without a gradient.

    Args:
        x: any tensor with the batch at dim 0.
        policy: 1 keeps, 0 drops; None keeps all.
        dim: the token dim of `x`.
        keepdim: leave a dim of size 1.

    Raises:
        LeakError: `dim` does not hold the policy's tokens.
    """
    if policy is None:
        return x.sum(dim, keepdim=keepdim)
    if not x.is_floating_point():  # a count, such as of the real tokens in a padding mask
        kept = along(is_kept(policy), x.ndim, token_dim(x, policy, dim))
        return (x.to(torch.int64) * kept).sum(dim, keepdim=keepdim)
    operand = masked_contraction_operand(x, policy, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    return operand.sum(dim, keepdim=keepdim, dtype=wide).to(x.dtype)


def masked_mean(
    x: Float[Tensor, "B ..."], policy: Float[Tensor, "B L"] | None, dim: int, keepdim: bool = False
) -> Float[Tensor, "B ..."]:
    """Mean over the kept tokens: `sum_j D_j x_j / sum_j D_j`.

    The policy gets the gradient of both the sum and the count.

    Args:
        x: any tensor with the batch at dim 0.
        policy: 1 keeps, 0 drops; None keeps all.
        dim: the token dim of `x`.
        keepdim: leave a dim of size 1.

    Raises:
        LeakError: `dim` does not hold the policy's tokens.
    """
    if policy is None:
        return x.mean(dim, keepdim=keepdim)
    dim = token_dim(x, policy, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = masked_contraction_operand(x, policy, dim).sum(dim, keepdim=True, dtype=wide)
    count = along(policy.to(wide).sum(1, keepdim=True), x.ndim, dim)
    count = count + (count == 0)  # not clamp(): that stops the gradient of a count of 1
    mean = (total / count).to(x.dtype)
    return mean if keepdim else mean.squeeze(dim)


def masked_amax(
    x: Float[Tensor, "B ..."], policy: Float[Tensor, "B L"] | None, dim: int, keepdim: bool = False
) -> Float[Tensor, "B ..."]:
    """Maximum over the kept tokens.

    The policy gets no gradient: a maximum has none for tokens that do not attain it. `x` gets that
    of `Tensor.amax` (shared between ties).

    Args:
        x: any tensor with the batch at dim 0.
        policy: 1 keeps, 0 drops; None keeps all.
        dim: the token dim of `x`.
        keepdim: leave a dim of size 1.

    Raises:
        LeakError: `dim` does not hold the policy's tokens.
    """
    if policy is None:
        return x.amax(dim, keepdim=keepdim)
    dim = token_dim(x, policy, dim)
    dropped = dropped_along(policy, x.ndim, dim)
    # Where nothing is kept, fill with 0, so that the maximum is 0 and not -inf.
    nothing = torch.logical_not(is_kept(policy).any(1, keepdim=True))
    lowest = along(torch.where(nothing, 0.0, float("-inf")), x.ndim, dim).to(x.dtype)
    return torch.where(dropped, lowest, x).amax(dim, keepdim=keepdim)
