"""How many patch tokens a stage keeps."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

__all__ = ["Rounding", "counts_in_words", "num_keep"]

Rounding = Literal["floor", "ceil", "round"]

_FLOAT_NOISE = 1e-6


def num_keep(num_patches: int, keep_ratio: float, rounding: Rounding = "floor") -> int:
    """Number of patch tokens kept out of an image's original ones.

    DynamicViT counts `int(N * ratio)` of the *original* N, which is `"floor"` here: a ratio of 0.7
    keeps 137, 96 and 67 of 196 tokens over three stages of 0.7, 0.7^2 and 0.7^3. A product that
    is less than 1e-6 tokens below a whole number counts as that number, because `100 * 0.29` is
    28.999999999999996 in floating point. The result never falls when `keep_ratio` grows.

    Args:
        num_patches: N, the patch tokens of the image before any stage; at least 1.
        keep_ratio: kept share of N, in (0, 1].
        rounding: `"floor"`, `"ceil"` (EViT), or `"round"` (halves go up).

    Returns:
        A whole number in [1, N].
    """
    if num_patches < 1:
        raise ValueError(f"num_keep needs at least 1 patch token, got num_patches={num_patches}.")
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must lie in (0, 1], got {keep_ratio}.")
    exact = num_patches * keep_ratio
    if rounding == "floor":
        count = math.floor(exact + _FLOAT_NOISE)
    elif rounding == "ceil":
        count = math.ceil(exact - _FLOAT_NOISE)
    else:
        count = math.floor(exact + 0.5 + _FLOAT_NOISE)
    return min(max(count, 1), num_patches)


def counts_in_words(patches: Sequence[int], kept: Sequence[int]) -> str:
    """Token counts along the network, from N and K of each stage: `196 -> 137 -> 96`; with two
    grids `784 -> 548, 196 -> 96`."""
    grids = groupby(zip(patches, kept, strict=True), key=lambda pair: pair[0])
    counts = ((total, *(count for _, count in pairs)) for total, pairs in grids)
    return ", ".join(" -> ".join(map(str, grid)) for grid in counts)
