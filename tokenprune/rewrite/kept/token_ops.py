"""What replaces operators that mix tokens: where some are hidden, and where some stand for several.

All take (tensor, policy, dim, ...): a policy [B, L] of 1 and 0, or sizes; None changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tokenprune.ops.attention import masked_attention
from tokenprune.ops.merging import (
    weighted_amax,
    weighted_attention,
    weighted_mean,
    weighted_operand,
    weighted_softmax,
    weighted_sum,
)
from tokenprune.ops.pooling import (
    hide_dropped,
    masked_amax,
    masked_contraction_operand,
    masked_mean,
    masked_sum,
)
from tokenprune.ops.softmax import masked_softmax

__all__ = ["MASKED", "WEIGHTED", "TokenOps", "masked_max", "weighted_max"]


class Maximum(NamedTuple):
    """What `torch.max(x, dim)` returns, without positions."""

    values: Tensor
    indices: None = None


def masked_max(x: Tensor, policy: Tensor, dim: int, keepdim: bool = False) -> Maximum:
    """`torch.max(x, dim)` over kept tokens. Positions are not formed: a host that reads them fails
    by name instead of getting positions among all tokens."""
    return Maximum(masked_amax(x, policy, dim, keepdim))


def weighted_max(x: Tensor, sizes: Tensor, dim: int, keepdim: bool = False) -> Maximum:
    """`torch.max(x, dim)` over merged tokens, without positions."""
    return Maximum(weighted_amax(x, sizes, dim, keepdim))


class TokenOps(NamedTuple):
    """One operator of each kind.

    Attributes:
        weighs: The policy holds sizes.
        hide: Makes an operand of a contraction harmless whose other one is zero at dropped tokens;
            None if it is.
        operand: The right operand of any other contraction.
    """

    weighs: bool
    attention: Callable[..., Any]
    softmax: Callable[..., Any]
    mean: Callable[..., Any]
    sum: Callable[..., Any]
    amax: Callable[..., Any]
    max: Callable[..., Any]
    hide: Callable[..., Any] | None
    operand: Callable[..., Any]


MASKED = TokenOps(
    False, masked_attention, masked_softmax, masked_mean, masked_sum, masked_amax, masked_max,
    hide_dropped, masked_contraction_operand,
)  # fmt: skip
WEIGHTED = TokenOps(
    True, weighted_attention, weighted_softmax, weighted_mean, weighted_sum, weighted_amax,
    weighted_max, None, weighted_operand,
)  # fmt: skip
