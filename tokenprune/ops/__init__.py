"""Operators: small pure functions on tensors, each one node of a rewritten graph."""

from tokenprune.ops.attention import masked_attention
from tokenprune.ops.gumbel import sample_decision, sample_topk
from tokenprune.ops.kept_sets import check_keep_indices
from tokenprune.ops.moving import gather_aligned, gather_tokens, scatter_tokens
from tokenprune.ops.pooling import (
    hide_dropped,
    masked_amax,
    masked_contraction_operand,
    masked_mean,
    masked_sum,
)
from tokenprune.ops.selection import select_topk
from tokenprune.ops.softmax import masked_softmax

__all__ = [
    "check_keep_indices",
    "gather_aligned",
    "gather_tokens",
    "hide_dropped",
    "masked_amax",
    "masked_attention",
    "masked_contraction_operand",
    "masked_mean",
    "masked_softmax",
    "masked_sum",
    "sample_decision",
    "sample_topk",
    "scatter_tokens",
    "select_topk",
]
