"""Check kept sets that come from outside."""

import torch
from torch import Tensor

from tokenprune.errors import KeepIndicesError

__all__ = ["check_keep_indices"]


def check_keep_indices(
    keep_indices: Tensor,
    *,
    batch_size: int,
    num_patches: int,
    num_keep: int | None = None,
    padded: bool = False,
) -> None:
    """Check a kept set that came from outside; reads values, so not for use inside a graph.

    Args:
        keep_indices: what should be [B, K], unique for each image, in 0..N-1; any order.
        batch_size: B.
        num_patches: N.
        num_keep: K, or None for any from 1 to N.
        padded: -1 may stand where an image keeps fewer than others, but one token at least.

    Raises:
        KeepIndicesError: it is not that. The message names the image and the value.
    """
    if keep_indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise KeepIndicesError(
            f"keep_indices must hold integers, found {keep_indices.dtype}; "
            "call mask.nonzero() to turn a mask into indices"
        )
    shape = tuple(keep_indices.shape)
    wanted = num_keep if num_keep is not None else f"K from 1 to {num_patches}"
    fits = len(shape) == 2 and shape[0] == batch_size and 1 <= shape[1] <= num_patches
    if not fits or (num_keep is not None and shape[1] != num_keep):
        raise KeepIndicesError(
            f"keep_indices must have the shape [{batch_size}, {wanted}], found {list(shape)}; "
            "pass one row of patch indices for each image"
        )
    lowest = -1 if padded else 0
    outside = (keep_indices < lowest) | (keep_indices >= num_patches)
    if outside.any():
        image, column = (int(i) for i in outside.nonzero()[0])
        raise KeepIndicesError(
            f"keep_indices of image {image} hold {int(keep_indices[image, column])}, but there are "
            f"{num_patches} patch tokens; use 0 to {num_patches - 1} (prefix tokens do not count)"
        )
    ordered = keep_indices.sort(dim=1).values
    empty = ordered[:, -1] < 0
    if empty.any():
        raise KeepIndicesError(
            f"keep_indices of image {int(empty.nonzero()[0])} name no token; keep one at least"
        )
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        image, column = (int(i) for i in twice.nonzero()[0])
        raise KeepIndicesError(
            f"keep_indices of image {image} hold {int(ordered[image, column])} twice; "
            "name each token once"
        )
