"""What `PrunedModel.using` forces."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import KeepIndicesError
from tokenprune.ops.selection import in_order
from tokenprune.rewrite.settings import Path

__all__ = ["NOTHING", "OfThreads", "Overrides", "forced_sets"]


@dataclass(frozen=True)
class Overrides:
    """What is forced in one thread."""

    path: Path | None = None
    keep_indices: tuple[Tensor, ...] | None = None
    generator: torch.Generator | None = None


NOTHING = Overrides()


class OfThreads(dict[int, Overrides]):
    """Thread -> what is forced in it. Nothing is, in a copy."""

    def __deepcopy__(self, _: Any) -> "OfThreads":
        return OfThreads()

    def __reduce__(self) -> Any:
        return OfThreads, ()


def forced_sets(
    sets: Sequence[Tensor], blocks: Sequence[int], starts: Collection[int], padded: bool
) -> tuple[Tensor, ...]:
    """The kept sets in order, for stages at `blocks`.

    Args:
        starts: The stages whose set need not lie in the one before.
        padded: Whether -1 may stand where an image keeps fewer tokens.

    Raises:
        KeepIndicesError: There are too many or too few, or one is no set.
    """
    if len(sets) != len(blocks):
        raise KeepIndicesError(
            f"Got keep_indices for {len(sets)} stages; the plan has {len(blocks)}, "
            f"at blocks {list(blocks)}. Give one [B, K] tensor per stage."
        )
    wrong = [kept for kept in sets if not isinstance(kept, Tensor) or kept.ndim != 2]
    if wrong:
        found = f"shape {tuple(wrong[0].shape)}" if isinstance(wrong[0], Tensor) else wrong[0]
        raise KeepIndicesError(
            f"keep_indices must be [B, K] tensors of whole numbers, found {found!r}. Give one for "
            "each stage."
        )
    _check_nested(sets, starts)
    ordered = tuple(map(in_order, sets))
    return tuple(map(_trimmed, ordered)) if padded else ordered


def _check_nested(sets: Sequence[Tensor], starts: Collection[int]) -> None:
    for stage, (before, after) in enumerate(pairwise(sets), start=1):
        if stage in starts:
            continue
        for image, (wide, narrow) in enumerate(zip(before.tolist(), after.tolist(), strict=False)):
            lost = sorted(set(narrow) - set(wide) - {-1})
            if lost:
                raise KeepIndicesError(
                    f"keep_indices of stage {stage} keep patches {lost[:5]} of image {image}, "
                    f"which stage {stage - 1} dropped. Choose each stage's set from the set of the "
                    "stage before."
                )


def _trimmed(kept: Tensor) -> Tensor:
    """A set [B, K] in order without the columns that say -1 for every image."""
    longest = int((kept >= 0).sum(1).max()) if kept.numel() else 0
    return kept[:, : max(longest, 1)]
