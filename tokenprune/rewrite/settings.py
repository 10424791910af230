"""What one call asks for: the argument of every rewritten graph beside the host's own."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["PATHS", "SETTINGS", "CallSettings", "Path", "PathName"]

Path = Literal["dense", "mask", "gather"]
PATHS: tuple[Path, ...] = ("dense", "mask", "gather")
PathName = Path | Literal["jagged", "expanded"]
"""`jagged` is the gather path where images keep different numbers of tokens; on `expanded` every
member of a group of merged tokens stays, which proves the merged path."""

SETTINGS = "tokenprune_settings"
"""Name of the placeholder; no host has such an argument."""


@dataclass(frozen=True)
class CallSettings:
    """The settings of one forward.

    Attributes:
        num_keep: K of each stage.
        sample: Draw decisions with Gumbel noise (training).
        threshold: Without noise, each image keeps the tokens whose keep probability is above this;
            None takes the top K of every image.
        temperature: Of the Gumbel-softmax.
        hard: 0/1 decisions.
        fixed: Drawn decisions keep K tokens of each image.
        spread: Scores get noise that is spread over the tokens, the same in every call.
        keep_indices: Kept sets forced from outside, per stage: [B, K] in original numbering,
            ascending, then -1 where an image has fewer.
        groups: Groups of merged tokens forced from outside, per stage: [B, N] for each patch the
            number of the one that stands for it.
        generator: Source of the noise.
        poison: `verify` only: overwrite dropped tokens with NaN and inf, to see that nobody reads
            them.
    """

    num_keep: tuple[int, ...]
    sample: bool
    threshold: float | None = None
    temperature: float = 1.0
    hard: bool = True
    fixed: bool = False
    spread: bool = False
    keep_indices: tuple[Tensor, ...] | None = None
    groups: tuple[Tensor, ...] | None = None
    generator: torch.Generator | None = None
    poison: bool = False
