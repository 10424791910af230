"""What recipes may name: scorers, modes, and by them recipes that fit any host."""

import re
from typing import Any

from tokenprune.registry import Registry

__all__ = ["MODES", "SCORERS", "named_recipe", "named_recipes"]

SCORERS: Registry[Any] = Registry("scorer")
"""Classes of `tokenprune.scorers`, by the `scorer` of a recipe."""
MODES: Registry[Any] = Registry("mode")
"""Classes of `tokenprune.reductions`, by the `mode` of a recipe."""

NAME = re.compile(r"(?P<scorer>.+)-k(?P<ratio>0?\.\d+|1)")


def named_recipe(name: str) -> dict[str, Any] | None:
    """The mapping of the recipe `<scorer>-k<keep ratio>` for any host, such as `random-k0.7`.

    Returns:
        None if there is no such scorer, or it has to be trained.
    """
    match = NAME.fullmatch(name)
    if match is None or match["scorer"] not in _untrained():
        return None
    schedule = {"keep_ratio": float(match["ratio"])}
    return {"version": 1, "name": name, "scorer": match["scorer"], "schedule": schedule}


def named_recipes() -> list[str]:
    """One name for each scorer that needs no training, sorted: that with the ratio 0.7."""
    return sorted(f"{name}-k0.7" for name in _untrained())


def _untrained() -> list[str]:
    return [name for name in SCORERS if not SCORERS[name].probabilistic]
