"""A policy laid along one dim of a tensor: what every other operator starts with."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

__all__ = ["along", "diagonal", "dropped_along", "finite_if_dropped", "is_kept", "not_batch"]


def is_kept(policy: Float[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """True where the policy keeps the token.

    A hard policy holds exactly 0 and 1; with soft samples the token counts as kept above one half.
    """
    return policy > 0.5


def not_batch(dim: int, ndim: int) -> int:
    """`dim` counted from the left; the batch (dim 0) cannot be a token dim.

    Raises:
        IndexError: `dim` is out of range or is the batch.
    """
    found = dim + ndim if dim < 0 else dim
    if not 0 < found < ndim:
        raise IndexError(
            f"asked for tokens along dim {dim} of a tensor of rank {ndim}, whose dim 0 is the "
            f"batch; pass a dim from 1 to {ndim - 1} (or from {1 - ndim} to -1)"
        )
    return found


def along(values: Shaped[Tensor, "B L"], ndim: int, dim: int) -> Shaped[Tensor, "B ..."]:
    """[B, L] as a view of rank `ndim` with the batch at dim 0, L at `dim` and 1 elsewhere."""
    shape = [1] * ndim
    shape[0], shape[dim] = values.shape
    return values.reshape(shape)


def dropped_along(policy: Float[Tensor, "B L"], ndim: int, dim: int) -> Bool[Tensor, "B ..."]:
    """True at dropped tokens, laid along `dim` of a tensor of rank `ndim`."""
    return along(torch.logical_not(is_kept(policy)), ndim, dim)


def diagonal(
    length: int, ndim: int, dim: int, query_dim: int, device: torch.device
) -> Bool[Tensor, "..."]:
    """True where the query along `query_dim` is the key along `dim`; rank `ndim`, 1 elsewhere."""
    shape = [1] * ndim
    shape[dim] = shape[query_dim] = length
    return torch.eye(length, dtype=torch.bool, device=device).reshape(shape)


def finite_if_dropped(
    grad_policy: Float[Tensor, "B Lk"], policy: Float[Tensor, "B Lk"]
) -> Float[Tensor, "B Lk"]:
    """0 for dropped tokens whose contents made their gradient inf or NaN; those teach nothing."""
    broken = torch.logical_not(grad_policy.abs() < float("inf"))
    return grad_policy.masked_fill(broken & torch.logical_not(is_kept(policy)), 0).to(policy.dtype)
