"""The seam of scorers: what a stage asks about its tokens.

A scorer is a module, one for each stage, at `token_predictors.{stage}`. It says what it reads from
the host's graph beside the patch tokens; the rewriter hands that over on every path.
"""

from abc import ABC, abstractmethod
from enum import Flag, auto
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenprune.ops.matching import Groups, Pairs
from tokenprune.recipe.names import SCORERS
from tokenprune.recipe.schema import PredictorSection

__all__ = [
    "PREDICTORS",
    "SCORERS",
    "Mask",
    "Matcher",
    "Need",
    "Predictors",
    "Scorer",
    "Scores",
    "Tokens",
    "Weigher",
    "as_keep_logits",
]

Tokens = Float[Tensor, "B N D"]
Mask = Float[Tensor, "B N"] | None
Scores = Float[Tensor, "B N 2"]
"""What a scorer takes and returns; see `Scorer.forward`."""

PREDICTORS = "token_predictors"
"""Where the scorers of a wrapped model are: the first part of their state-dict keys."""


class Need(Flag):
    """What a scorer reads beside the patch tokens, as keyword arguments of its `forward`."""

    NOTHING = 0
    KEYS = auto()
    """`keys` [B, H, N, d]: the keys of the patch tokens in the nearest attention: the same
    block's at its middle, the block before's at an entry."""
    CLASS_LOGITS = auto()
    """`class_logits` [B, H, P + N]: of the class token to all tokens in that attention, before its
    softmax, position biases and masks included."""
    NOISE = auto()
    """`generator`: the source of random numbers that `using(generator=...)` gave, or None."""


class Scorer(nn.Module, ABC):
    """Scores the patch tokens that enter a stage.

    Attributes:
        needs: What it reads beside the tokens.
        probabilistic: Its scores are log-probabilities, from which training draws decisions and
            which a threshold can be compared with. Otherwise only their order counts: every stage
            keeps its best K, in training too.
    """

    needs: ClassVar[Need] = Need.NOTHING
    probabilistic: ClassVar[bool] = False

    @classmethod
    def make(cls, dim: int, section: PredictorSection, **like: Any) -> Self:
        """One scorer for a stage whose tokens have `dim` channels.

        Args:
            dim: D.
            section: `predictor` of the recipe.
            like: Device and dtype of parameters.
        """
        return cls()

    def is_fresh(self) -> bool:
        """Whether it has to learn and has not: its parameters still rank tokens as they did when it
        was made. Eval then warns. Reads values, so it is asked outside of what is compiled."""
        return False

    @abstractmethod
    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        """Scores of keeping and of dropping each token, fp32 or better.

        Args:
            tokens: patch tokens; no prefix tokens are among them.
            present: 1 for tokens that are there and real, 0 for dropped and padded ones; None if
                all are. Scores of present tokens must not depend on what the others hold.
            needed: what `needs` asks for.
        """


class Matcher(Scorer):
    """A scorer that also says which token each one that leaves is like: what merging asks."""

    @abstractmethod
    def match(
        self,
        tokens: Tokens,
        real: Bool[Tensor, "B N"] | None,
        first: int,
        num_keep: int,
        **needed: Any,
    ) -> Groups | Pairs:
        """Sort N patches into `num_keep` groups.

        Args:
            tokens: patch tokens that are there; each may stand for several already.
            real: False where one is padding; None if none is.
            first: place of the first patch in the sequence.
            num_keep: K, from 1 to N.
            needed: what `needs` asks for.
        """


class Weigher(Scorer):
    """A scorer whose scores are weights: 0 or more, 0 where no token is present."""


class Predictors(nn.Sequential):
    """The scorers of all stages. They never run one after the other: this is a list which can also
    stand where a module with a forward is asked for, as in PEFT's `modules_to_save`."""


def as_keep_logits(score: Float[Tensor, "B N"]) -> Scores:
    """Scores of keeping as the pair that a stage reads, in fp32 or better."""
    wide = score.to(torch.promote_types(score.dtype, torch.float32))
    return torch.stack([wide, -wide], dim=-1)
