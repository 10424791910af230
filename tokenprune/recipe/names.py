"""What recipes may name: scorers and modes; and by methods, recipes that fit any host."""

import re
from typing import Any

from tokenprune.recipe.methods import Method, list_methods, method_named
from tokenprune.registry import Registry

__all__ = ["MODES", "SCORERS", "named_recipe", "named_recipes", "recipe_of"]

SCORERS: Registry[Any] = Registry("scorer", group="tokenprune.scorers")
"""Classes of `tokenprune.scorers`, by the `scorer` of a recipe."""
MODES: Registry[Any] = Registry("mode", group="tokenprune.modes")
"""Classes of `tokenprune.reductions`, by the `mode` of a recipe."""

NAME = re.compile(r"(?P<part>.+)-k(?P<ratio>0?\.\d+|1)")


def named_recipe(name: str) -> dict[str, Any] | None:
    """The mapping of a recipe for any host: of a method (`tome-r13`), a mode (`merge-k0.7`), or a
    scorer that needs no training (`key-norm-k0.7`).

    Returns:
        None if there is none of that name.
    """
    method = method_named(name)
    if method is not None:
        return recipe_of(method)
    match = NAME.fullmatch(name)
    modes = {mode: {"mode": mode} for mode in MODES}
    chosen = None if match is None else (_untrained() | modes).get(match["part"])
    if match is None or chosen is None:
        return None
    schedule = {"keep_ratio": float(match["ratio"])}
    return {"version": 1, "name": name, **chosen, "schedule": schedule}


def recipe_of(method: Method) -> dict[str, Any]:
    """The mapping of a method's recipe."""
    return {"version": 1, "name": method.name, **method.recipe()}


def named_recipes() -> list[str]:
    """One name for each method, and for each scorer or mode of another package, sorted."""
    recipes = [named_recipe(name) or {} for name in list_methods()]
    chosen = {part for recipe in recipes for part in (recipe.get("scorer"), recipe.get("mode"))}
    return sorted(
        [*list_methods(), *(f"{part}-k0.7" for part in _untrained() if part not in chosen)]
    )


def _untrained() -> dict[str, dict[str, str]]:
    """Name -> the part of a recipe that chooses it."""
    scorers = [name for name in SCORERS if not SCORERS[name].probabilistic]
    modes = [name for name in MODES if MODES[name].defaults.get("scorer") in scorers]
    chosen = {name: {"scorer": name} for name in scorers}
    return chosen | {name: {"mode": name} for name in modes}
