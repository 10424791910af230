"""What a host does with its padding mask after a stage."""

import torch

from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite

__all__ = ["CountRealTokens"]


class CountRealTokens(Pass):
    """Where a host counts its real tokens, to divide by it, there is always one: a mean over
    nothing is 0, not NaN."""

    def apply(self, rewrite: Rewrite) -> None:
        for node in rewrite.nodes():
            if rewrite.facts(node).counts_real:
                rewrite.map_output(node, torch.clamp_min, 1)
