"""The host on as many tokens as pruning leaves, without any selection: what speed is possible."""

import copy
from typing import Any

import torch
from torch import nn

from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.state import in_mode

__all__ = ["replay_of"]


class _Cut:
    """Hands a block the first tokens alone."""

    def __init__(self, length: int) -> None:
        self.length, self.ran = length, False

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:
            return None
        self.ran = True
        return args[0][:, : self.length].contiguous(), *args[1:]


@torch.no_grad()
def replay_of(model: PrunedModel, arguments: Arguments) -> nn.Module | None:
    """A copy of the host whose blocks at the stages get the first K tokens. A stage in the middle
    of a block counts as at its entry.

    None where that is no measure: branches that are bypassed, and hosts whose blocks hold tables of
    positions for all tokens.
    """
    pruning = pruning_of(model)
    if not pruning.method.reduction.removes:
        return None
    programs = pruning.programs(arguments)
    counts = pruning.budget.counts(programs.num_patches)
    host, cuts = copy.deepcopy(pruning.host), []
    for block, count in zip(pruning.plan.blocks, counts, strict=True):
        cuts.append(_Cut(pruning.plan.num_prefix + count))
        host.get_submodule(pruning.spec.blocks[block]).register_forward_pre_hook(cuts[-1])
    with in_mode(host, training=False):
        try:
            arguments.call(host)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of shapes: the host cannot run on fewer tokens without a rewrite
            return None
    return host if all(cut.ran for cut in cuts) else None
