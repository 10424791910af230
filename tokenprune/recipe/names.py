"""Names that recipes may use because something registered them: scorers, modes, whole recipes."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from tokenprune.errors import did_you_mean

__all__ = ["check_known", "know", "name_recipes", "named_recipe", "named_recipes"]

Key = Literal["mode", "scorer"]
SHOWN_RATIO = 0.7
NAME = re.compile(r"(?P<family>.+)-k(?P<ratio>0?\.\d+|1)")

_known: dict[Key, list[str]] = {"mode": [], "scorer": []}
_families: dict[str, Mapping[str, Any]] = {}


def know(key: Key, name: str) -> None:
    """Let a key of a recipe have the value `name`."""
    if name not in _known[key]:
        _known[key].append(name)


def check_known(key: Key, name: str) -> str:
    """`name`, if it was made known; else ValueError with the nearest names."""
    if name not in _known[key]:
        raise ValueError(f"there is no {key} {name!r}. {did_you_mean(name, _known[key])}")
    return name


def name_recipes(family: str, keys: Mapping[str, Any]) -> None:
    """Make `<family>-k<ratio>` the name of a recipe for any host.

    Args:
        family: First part of the name.
        keys: Of the recipe, beside `version`, `name` and `schedule`.
    """
    _families[family] = dict(keys)


def named_recipe(name: str) -> dict[str, Any] | None:
    """The mapping of the recipe of that name; None if no family has it."""
    match = NAME.fullmatch(name)
    if match is None or match["family"] not in _families:
        return None
    schedule = {"keep_ratio": float(match["ratio"])}
    return {"version": 1, "name": name, "schedule": schedule, **_families[match["family"]]}


def named_recipes() -> list[str]:
    """One name of each family, sorted: that with the ratio 0.7."""
    return sorted(f"{family}-k{SHOWN_RATIO:g}" for family in _families)
