"""What recipes may name: scorers, modes, and by them recipes that fit any host."""

import re
from typing import Any

from tokenprune.registry import Registry

__all__ = ["MODES", "SCORERS", "named_recipe", "named_recipes"]

SCORERS: Registry[Any] = Registry("scorer")
"""Classes of `tokenprune.scorers`, by the `scorer` of a recipe."""
MODES: Registry[Any] = Registry("mode")
"""Classes of `tokenprune.reductions`, by the `mode` of a recipe."""

NAME = re.compile(r"(?P<method>.+?)(?P<falling>-falling)?-k(?P<ratio>0?\.\d+|1)|tome-r(?P<r>\d+)")


def named_recipe(name: str) -> dict[str, Any] | None:
    """The mapping of a recipe for any host: `<scorer or mode>-k<keep ratio>` (`random-k0.7`,
    `merge-k0.7`), `merge-falling-k<keep ratio>`, `tome-r<tokens a block>`.

    Returns:
        None if there is no such scorer or mode, or it has to be trained.
    """
    match = NAME.fullmatch(name)
    method = None if match is None else match["method"] or "merge"
    if match is None or method not in _untrained():
        return None
    schedule: dict[str, Any] = {"keep_ratio": float(match["ratio"])} if match["ratio"] else {}
    schedule |= {"r": int(match["r"])} if match["r"] else {}
    schedule |= {"falling": True} if match["falling"] else {}
    return {"version": 1, "name": name, **_untrained()[method], "schedule": schedule}


def named_recipes() -> list[str]:
    """One name for each method that needs no training, sorted."""
    return sorted([*(f"{name}-k0.7" for name in _untrained()), "merge-falling-k0.7", "tome-r13"])


def _untrained() -> dict[str, dict[str, str]]:
    """Name -> the part of a recipe that chooses the method."""
    scorers = [name for name in SCORERS if not SCORERS[name].probabilistic]
    modes = [name for name in MODES if MODES[name].defaults.get("scorer") in scorers]
    chosen = {name: {"scorer": name} for name in scorers}
    return chosen | {name: {"mode": name} for name in modes}
