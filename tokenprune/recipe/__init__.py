"""Recipes: checked YAML that says where a host is pruned and how its predictors are trained."""

from tokenprune.recipe.recipe import Recipe, RecipeSource, list_recipes, load_recipe

__all__ = ["Recipe", "RecipeSource", "list_recipes", "load_recipe"]
