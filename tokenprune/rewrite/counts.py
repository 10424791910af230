"""What a host does with its padding mask behind a stage."""

import torch

from tokenprune.rewrite.rewrite import Pass, Rewrite

__all__ = ["CountRealTokens"]


class CountRealTokens(Pass):
    """Where a host counts its real tokens, to divide by it, there is always one: a mean over
    nothing is 0, not NaN."""

    def apply(self, rewrite: Rewrite) -> None:
        for count in rewrite.axes.counts:
            node = rewrite.copy_of(count)
            readers = list(node.users)
            some = rewrite.insert_after(node, torch.clamp_min, node, 1)
            for reader in readers:
                reader.replace_input_with(node, some)
