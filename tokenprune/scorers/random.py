"""Random scores: the baseline that every other scorer has to beat."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tokenprune.scorers.protocol import SCORERS, Need, Scorer, as_keep_logits

__all__ = ["Random"]


@SCORERS.register("random")
class Random(Scorer):
    """Uniform in [0, 1), drawn again in every call, for each image on its own."""

    needs: ClassVar[Need] = Need.NOISE

    def forward(
        self,
        tokens: Float[Tensor, "B N D"],
        present: Float[Tensor, "B N"] | None = None,
        **needed: Any,
    ) -> Float[Tensor, "B N 2"]:
        # generator=None is another overload, which refuses the open batch size of torch.compile
        source = {} if needed["generator"] is None else {"generator": needed["generator"]}
        return as_keep_logits(torch.rand(tokens.shape[:2], device=tokens.device, **source))
