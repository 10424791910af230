"""What says which tokens matter: one file a scorer."""

from tokenprune.scorers.key_norm import KeyNorm
from tokenprune.scorers.learned import TokenPredictor
from tokenprune.scorers.protocol import Need, Scorer
from tokenprune.scorers.random import Random
from tokenprune.scorers.registry import register_scorer, scorer_by_name, scorer_names
from tokenprune.scorers.token_norm import TokenNorm

__all__ = [
    "KeyNorm",
    "Need",
    "Random",
    "Scorer",
    "TokenNorm",
    "TokenPredictor",
    "register_scorer",
    "scorer_by_name",
    "scorer_names",
]
