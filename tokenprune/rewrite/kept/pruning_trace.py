"""What happened to the tokens in one call: returned beside the output by `return_trace=True`."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PruningTrace", "StageTrace"]


@dataclass
class StageTrace:
    """One stage of one call.

    Attributes:
        keep_logits: [B, N, 2] log-probabilities of keep and drop (scores, where the scorer is not
            probabilistic). On the gather path, tokens that an earlier stage removed hold -inf for
            keep and 0 for drop.
        decision: [B, N] 0/1 over the original patches; carries the straight-through gradient on the
            mask path.
        keep_indices: [B, K] sorted, in original patch numbering; None on the mask path. With a
            threshold, where images keep different numbers of tokens, K is the most that an image
            keeps, and the rows of the others end in -1. `decision.sum(1)` counts each image's
            tokens.
        num_tokens: Patch tokens per image after the stage: K, or their mean over the batch where
            images differ (mask path, threshold).
        groups: [B, N] where tokens merge: for each original patch the number of the patch that
            stands for its group; its own if it is that one. None otherwise.
        sizes: [B, K] where tokens merge: how many original patches each token stands for, in the
            order of `keep_indices`. None otherwise.
    """

    keep_logits: Tensor
    decision: Tensor
    keep_indices: Tensor | None
    num_tokens: Tensor | int
    groups: Tensor | None = None
    sizes: Tensor | None = None


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
