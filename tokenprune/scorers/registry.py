"""Scorers by the name that a recipe gives."""

from collections.abc import Callable
from typing import TypeVar

from tokenprune.errors import PlanError, RegistrationError, did_you_mean
from tokenprune.recipe.names import know, name_recipes
from tokenprune.scorers.protocol import Scorer

__all__ = ["register_scorer", "scorer_by_name", "scorer_names"]

LEARNED = "learned"
S = TypeVar("S", bound=type[Scorer])
_scorers: dict[str, type[Scorer]] = {}


def register_scorer(name: str, *, replace: bool = False) -> Callable[[S], S]:
    """Class decorator: make a scorer known to recipes as `scorer: name`.

    One that samples nothing (`probabilistic = False`) is also a recipe for any host: `name-k0.7`
    keeps 0.7 of the tokens at each of three stages.

    Raises:
        RegistrationError: The name is taken, and `replace` is False.
    """

    def register(scorer: S) -> S:
        if name in _scorers and not replace:
            raise RegistrationError(
                f"A scorer named {name!r} is registered already: "
                f"{_scorers[name].__module__}.{_scorers[name].__name__}. Choose another name, or "
                "pass replace=True to put yours in its place."
            )
        _scorers[name] = scorer
        know("scorer", name)
        if not scorer.probabilistic:
            name_recipes(name, {"scorer": name})
        return scorer

    return register


def scorer_names() -> list[str]:
    """Names of all scorers, sorted."""
    return sorted(_scorers)


def scorer_by_name(name: str) -> type[Scorer]:
    """The scorer of that name.

    Raises:
        PlanError: There is none; names the nearest.
    """
    if name not in _scorers:
        raise PlanError(f"No scorer is named {name!r}. {did_you_mean(name, _scorers)}")
    return _scorers[name]
