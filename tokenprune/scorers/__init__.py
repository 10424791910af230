"""What says which tokens matter: one file a scorer."""

from tokenprune.scorers.key_norm import KeyNorm
from tokenprune.scorers.learned import TokenPredictor
from tokenprune.scorers.protocol import SCORERS, Need, Scorer, as_keep_logits
from tokenprune.scorers.random import Random
from tokenprune.scorers.token_norm import TokenNorm

__all__ = [
    "SCORERS",
    "KeyNorm",
    "Need",
    "Random",
    "Scorer",
    "TokenNorm",
    "TokenPredictor",
    "as_keep_logits",
]
