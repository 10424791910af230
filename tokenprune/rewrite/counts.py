"""What a host does with its padding mask after a stage."""

import torch

from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import Rewrite

__all__ = ["CountRealTokens"]


class CountRealTokens(Pass):
    """Where a host counts its real tokens, to divide by it, there is always one: a mean over
    nothing is 0, not NaN."""

    def apply(self, rewrite: Rewrite) -> None:
        for node in [node for node in rewrite.nodes() if rewrite.facts(node).counts_real]:
            readers = list(node.users)
            some = rewrite.insert_after(node, torch.clamp_min, node, 1)
            for reader in readers:
                reader.replace_input_with(node, some)
