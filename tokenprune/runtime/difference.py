"""How far outputs are apart, and how far rounding alone may bring them."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["EXACT", "TOLERANCE", "difference", "largest", "with_itself"]

# Largest difference, relative to the output's scale, that rounding alone may cause.
EXACT = 1e-9
TOLERANCE = {torch.float64: EXACT, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def largest(bounds: Mapping[torch.dtype, float], dtypes: Iterable[torch.dtype]) -> float:
    """The bound of the coarsest of some dtypes."""
    return max(bounds.get(dtype, bounds[torch.float32]) for dtype in dtypes)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference relative to the scale of `theirs`; inf if shapes or NaNs differ."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if torch.equal(a, b) or not b.numel():
            continue
        scale = b.double().abs().max().clamp_min(1e-6)
        error = float(((a.double() - b.double()).abs().max() / scale).item())
        worst = max(worst, error) if error == error else float("inf")
    return worst


def with_itself(together: Tensor, alone: Tensor, size: int, image: slice) -> Tensor:
    """Of an output that pairs each image with each of a batch (CLIP's logits), the pair of `image`
    with itself, which is all that an image alone has."""
    for dim in range(1, together.ndim):
        paired = together.ndim == alone.ndim and alone.shape[dim] == 1 != together.shape[dim]
        if paired and together.shape[dim] == size:
            together = together.narrow(dim, image.start, 1)
    return together
