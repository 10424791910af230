"""Modules that decide by what tensors hold: one node, which runs the module itself.

They can only come before the first block (SigLIP 2 resizes its position embeddings to the size of
each image). Under fake tensors they cannot run; their output has the example's shape.
"""

from torch import Tensor

from tokenprune.errors import HostError
from tokenprune.private import DataDependentOutputException
from tokenprune.tracing.draws import DRAW, DrawRead

__all__ = ["DATA_DEPENDENT", "OPAQUE", "REASON", "as_traced", "reason_of"]

OPAQUE = "opaque"
"""Key in the `meta` of such a node: the line of the host's source that asks what a tensor holds."""
REASON = "reason"
"""Key in the `meta` of such a node: why it was not traced through."""
DATA_DEPENDENT = (
    "Python asks for a value of a tensor, which differs from call to call. Decide by tensors "
    "(torch.where); if this is a loss that matches predictions with labels, leave the labels out "
    "and compute it from the model's output"
)


def as_traced(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`value`, if it has the traced shape, the batch aside.

    Raises:
        HostError: It has another: what follows was traced for that shape.
    """
    if tuple(value.shape[1:]) != tuple(shape):
        raise HostError(
            f"A module whose code decides by values returned {tuple(value.shape)}, but (B, "
            f"{', '.join(map(str, shape))}) when it was traced. Wrap the host with an input like "
            "this one."
        )
    return value


def reason_of(error: Exception) -> str | None:
    """Why code that asks for values cannot be traced; None if `error` is another one."""
    if isinstance(error, DrawRead):
        return DRAW
    return DATA_DEPENDENT if isinstance(error, DataDependentOutputException) else None
