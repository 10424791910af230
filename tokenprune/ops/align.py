"""A policy laid along one dim of a tensor: what every other operator starts with."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tokenprune.errors import LeakError

__all__ = [
    "along",
    "autocast_dtype",
    "diagonal",
    "dropped_along",
    "finite_if_dropped",
    "is_kept",
    "no_autocast",
    "policy_of",
    "token_dim",
]


# Asked once, since Dynamo of torch 2.11 and earlier cannot ask while it traces.
_KNOWS_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def is_kept(policy: Float[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """True where the policy keeps the token.

    A hard policy holds exactly 0 and 1; with soft samples the token counts as kept above one half.
    """
    return policy > 0.5


def policy_of(decision: Float[Tensor, "B N"], num_prefix: int) -> Float[Tensor, "B L"]:
    """The policy of all L = P + N tokens: prefix tokens are always kept."""
    ones = decision.new_ones(decision.shape[0], num_prefix)
    return torch.cat([ones, decision], dim=1)


def token_dim(x: Shaped[Tensor, "..."], policy: Float[Tensor, "B L"], dim: int) -> int:
    """`dim` counted from the left; LeakError unless it can hold the policy's tokens."""
    found = dim + x.ndim if dim < 0 else dim
    if not 0 < found < x.ndim:
        raise LeakError(
            f"asked for tokens along dim {dim} of a tensor of rank {x.ndim}, whose dim 0 is the "
            f"batch; pass a dim from 1 to {x.ndim - 1} (or from {1 - x.ndim} to -1)"
        )
    if (x.shape[0], x.shape[found]) != tuple(policy.shape):
        raise LeakError(
            f"the policy must have the shape [{x.shape[0]}, {x.shape[found]}] (images, tokens "
            f"along dim {dim}), found {list(policy.shape)}; these are not the policy's tokens. "
            "Pass the policy of these tokens"
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


def diagonal(x: Shaped[Tensor, "..."], dim: int, query_dim: int) -> Bool[Tensor, "..."]:
    """True where the query along `query_dim` of `x` is the key along `dim`; 1 along other dims."""
    shape = [1] * x.ndim
    shape[dim] = shape[query_dim] = x.shape[dim]
    return torch.eye(x.shape[dim], dtype=torch.bool, device=x.device).reshape(shape)


def finite_if_dropped(
    grad_policy: Float[Tensor, "B Lk"], policy: Float[Tensor, "B Lk"]
) -> Float[Tensor, "B Lk"]:
    """0 for dropped tokens whose contents made their gradient inf or NaN; those teach nothing."""
    broken = torch.logical_not(grad_policy.abs() < float("inf"))
    return grad_policy.masked_fill(broken & torch.logical_not(is_kept(policy)), 0).to(policy.dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The low precision that autocast runs products in on this device; None where it is off."""
    if device.type in _KNOWS_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Run what follows in the types it is given, on devices that know autocast at all."""
    if device.type in _KNOWS_AUTOCAST:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
