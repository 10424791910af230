"""What happened to the tokens in one call: returned beside the output by `return_trace=True`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.ops.jagged import one_hot
from tokenprune.runtime.program import Programs, Route

__all__ = ["PruningTrace", "StageTrace", "stage_traces"]


@dataclass
class StageTrace:
    """One stage of one call.

    Attributes:
        keep_logits: [B, N, 2] log-probabilities of keep and drop. On the gather path, tokens that
            an earlier stage removed hold -inf for keep and 0 for drop.
        decision: [B, N] 0/1 over the original patches; carries the straight-through gradient on the
            mask path.
        keep_indices: [B, K] sorted, in original patch numbering; None on the mask path. With a
            threshold, where images keep different numbers of tokens, K is that of the image that
            keeps most, and -1 stands behind the numbers of the others. `decision.sum(1)` counts
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


def stage_traces(
    path: Route, records: Sequence[tuple[Tensor, Tensor]], programs: Programs
) -> list[StageTrace]:
    """What a program recorded of each stage, in terms of the original patch tokens."""
    if path == "mask":
        return [
            StageTrace(logits, decision, None, decision.detach().sum(dim=1).mean())
            for logits, decision in records
        ]
    ragged = path == "ragged"
    stages, before = [], None
    patches_seen = programs.num_patches[: len(records)]  # the dense path has no stages
    for (logits, kept), patches in zip(records, patches_seen, strict=True):
        if before is not None and programs.plan.mode == "remove":
            logits = _spread(logits, before, patches)
        decision = one_hot(kept, logits.new_zeros(logits.shape[0], patches))
        count = decision.sum(dim=1).mean() if ragged else kept.shape[1]
        stages.append(StageTrace(logits, decision, kept, count))
        before = kept
    return stages


def _spread(logits: Tensor, kept: Tensor, num_patches: int) -> Tensor:
    """[B, N, 2] of [B, K, 2]: removed tokens have no logits of their own any more."""
    gone = torch.tensor([float("-inf"), 0.0], device=logits.device, dtype=logits.dtype)
    everyone = gone.expand(logits.shape[0], num_patches + 1, 2)
    places = torch.where(kept < 0, num_patches, kept)  # padding goes behind the last
    spread = everyone.scatter(1, places.unsqueeze(-1).expand(-1, -1, 2), logits)
    return spread[:, :num_patches]
