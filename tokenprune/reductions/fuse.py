"""Fuse: tokens that leave go on as one, their weighted sum (EViT, Liang et al., 2022)."""

import math
from collections.abc import Mapping
from typing import ClassVar

from tokenprune.reductions.at_middles import AtMiddles
from tokenprune.reductions.protocol import MODES
from tokenprune.reductions.remove import Remove
from tokenprune.rewrite.kept import FUSED_SETS, KeptSet
from tokenprune.rewrite.settings import PathName
from tokenprune.scorers import Weigher

__all__ = ["Fuse"]


@MODES.register("fuse")
class Fuse(AtMiddles, Remove):
    """Of K tokens that a stage leaves, one is the sum of all that leave.

    It stands in the place of the kept token with the least weight, and takes that one in: what its
    position has to do with (RoPE, biases, restored outputs) is that token's.
    """

    name: ClassVar[str] = "fuse"
    in_words: ClassVar[str] = "tokens that matter little go on as one"
    defaults: ClassVar[Mapping[str, str]] = {"scorer": "class-attention", "place": "middle"}
    scorers: ClassVar[tuple[type, ...]] = (Weigher,)
    kept_sets: ClassVar[Mapping[PathName, KeptSet]] = FUSED_SETS

    @classmethod
    def ratios(cls, keep_ratio: float, stages: int, patches: int) -> list[float]:
        """As EViT counts: each stage keeps that share of the tokens that are there, rounded up, and
        the fused one."""
        left, shares = patches, []
        for _ in range(stages):
            left = min(math.ceil(keep_ratio * left - 1e-6) + 1, left)
            shares.append(left / patches)
        return shares
