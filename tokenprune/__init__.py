"""Learned token pruning for vision transformers that somebody else wrote."""

from tokenprune import errors
from tokenprune.recipe import Recipe, list_recipes

__all__ = ["Recipe", "errors", "list_recipes"]
