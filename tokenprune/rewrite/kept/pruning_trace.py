"""What happened to the tokens in one call: returned beside the output by `return_trace=True`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.ops.selection import one_hot

__all__ = ["PruningTrace", "StageTrace", "number_traces"]


@dataclass
class StageTrace:
    """One stage of one call.

    Attributes:
        keep_logits: [B, N, 2] log-probabilities of keep and drop (scores, where the scorer is not
            probabilistic). On the gather path, tokens that
            an earlier stage removed hold -inf for keep and 0 for drop.
        decision: [B, N] 0/1 over the original patches; carries the straight-through gradient on the
            mask path.
        keep_indices: [B, K] sorted, in original patch numbering; None on the mask path. With a
            threshold, where images keep different numbers of tokens, K is that of the image that
            keeps most, and the rows of the others end in -1. `decision.sum(1)` counts
            each image's tokens.
        num_tokens: Patch tokens per image after the stage: K, or their mean over the batch where
            images differ (mask path, threshold).
    """

    keep_logits: Tensor
    decision: Tensor
    keep_indices: Tensor | None
    num_tokens: Tensor | int


@dataclass
class PruningTrace:
    """All stages of one call, first to last.

    Attributes:
        stages: One entry per stage; empty on the dense path.
        patch_tokens: [B, N, D] (mask and dense path) or [B, K, D] (gather path) patch tokens after
            the last block and its norm. With a threshold row i belongs to the token
            `stages[-1].keep_indices[:, i]`, and means nothing where that is -1.
        real: [B, N] True where a patch token is no padding; None if the call was given no mask.
            Pass it to the ratio loss, which then counts shares of the real tokens.
    """

    stages: list[StageTrace]
    patch_tokens: Tensor
    real: Tensor | None = None


def number_traces(
    records: Sequence[tuple[Tensor, Tensor]],
    num_patches: Sequence[int],
    nested: bool,
    count: Callable[[Tensor, Tensor], Tensor | int],
) -> list[StageTrace]:
    """The stages of a path that records numbers of tokens.

    Args:
        records: (keep_logits, numbers) of each stage.
        num_patches: N of each stage.
        nested: A stage sees only what the one before kept.
        count: `num_tokens` of a decision and its numbers.
    """
    stages, before = [], None
    for (logits, kept), patches in zip(records, num_patches, strict=True):
        if before is not None and nested:
            logits = _spread(logits, before, patches)
        decision = one_hot(kept, logits.new_zeros(logits.shape[0], patches))
        stages.append(StageTrace(logits, decision, kept, count(decision, kept)))
        before = kept
    return stages


def _spread(logits: Tensor, kept: Tensor, num_patches: int) -> Tensor:
    """[B, N, 2] of [B, K, 2]: removed tokens have no logits of their own any more."""
    gone = torch.tensor([float("-inf"), 0.0], device=logits.device, dtype=logits.dtype)
    everyone = gone.expand(logits.shape[0], num_patches + 1, 2)
    places = torch.where(kept < 0, num_patches, kept)  # padding goes to one more place
    spread = everyone.scatter(1, places.unsqueeze(-1).expand(-1, -1, 2), logits)
    return spread[:, :num_patches]
