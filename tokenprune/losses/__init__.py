"""Training losses: the terms, their weighted sum, and the whole loss of a wrapped model."""

from tokenprune.losses.model_loss import ModelLoss, for_model
from tokenprune.losses.pruning_loss import PruningLoss, distill_logits, distill_tokens, ratio_loss

__all__ = [
    "ModelLoss",
    "PruningLoss",
    "distill_logits",
    "distill_tokens",
    "for_model",
    "ratio_loss",
]
