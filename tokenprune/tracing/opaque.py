"""Modules that decide by what tensors hold: one node, which runs the module itself.

They can only come before the first block (SigLIP 2 resizes its position embeddings to the size of
each image). Under fake tensors they cannot run; their output has the example's shape.
"""

from torch import Tensor

from tokenprune.errors import HostError

__all__ = ["OPAQUE", "as_traced"]

OPAQUE = "opaque"
"""Key in the `meta` of such a node: the line of the host's source that asks what a tensor holds."""


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
