"""Random scores: the baseline that every other scorer has to beat."""

from typing import Any, ClassVar

import torch

from tokenprune.recipe.names import SCORERS
from tokenprune.scorers.protocol import Mask, Need, Scorer, Scores, Tokens, as_keep_logits

__all__ = ["Random"]


@SCORERS.register("random")
class Random(Scorer):
    """Uniform in [0, 1), drawn again in every call, for each image on its own."""

    needs: ClassVar[Need] = Need.NOISE

    def forward(self, tokens: Tokens, present: Mask = None, **needed: Any) -> Scores:
        # generator=None is another overload, which refuses the open batch size of torch.compile
        source = {} if needed["generator"] is None else {"generator": needed["generator"]}
        return as_keep_logits(torch.rand(tokens.shape[:2], device=tokens.device, **source))
