"""What says which tokens matter: one file a scorer."""

from tokenprune.scorers.class_attention import ClassAttention
from tokenprune.scorers.key_norm import KeyNorm
from tokenprune.scorers.learned import TokenPredictor
from tokenprune.scorers.protocol import SCORERS, Matcher, Need, Scorer, Weigher, as_keep_logits
from tokenprune.scorers.random import Random
from tokenprune.scorers.similarity import Similarity
from tokenprune.scorers.token_norm import TokenNorm

__all__ = [
    "SCORERS",
    "ClassAttention",
    "KeyNorm",
    "Matcher",
    "Need",
    "Random",
    "Scorer",
    "Similarity",
    "TokenNorm",
    "TokenPredictor",
    "Weigher",
    "as_keep_logits",
]
