"""Reductions by the name that a recipe gives."""

from collections.abc import Callable
from typing import TypeVar

from tokenprune.errors import PlanError, RegistrationError, did_you_mean
from tokenprune.recipe.names import know
from tokenprune.reductions.protocol import Reduction

__all__ = ["added_prefixes", "reduction_by_name", "reduction_names", "register_reduction"]

R = TypeVar("R", bound=type[Reduction])
_reductions: dict[str, type[Reduction]] = {}


def register_reduction(*, replace: bool = False) -> Callable[[R], R]:
    """Class decorator: make a reduction known to recipes under its `name`.

    Raises:
        RegistrationError: The name is taken, and `replace` is False.
    """

    def register(reduction: R) -> R:
        known = _reductions.get(reduction.name)
        if known is not None and not replace:
            raise RegistrationError(
                f"A reduction named {reduction.name!r} is registered already: {known.__module__}."
                f"{known.__name__}. Choose another name, or pass replace=True to put yours in its "
                "place."
            )
        _reductions[reduction.name] = reduction
        know("mode", reduction.name)
        return reduction

    return register


def reduction_names() -> list[str]:
    """Names of all reductions, sorted."""
    return sorted(_reductions)


def reduction_by_name(name: str) -> type[Reduction]:
    """The reduction of that name.

    Raises:
        PlanError: There is none; names the nearest.
    """
    if name not in _reductions:
        raise PlanError(f"No reduction is named {name!r}. {did_you_mean(name, _reductions)}")
    return _reductions[name]


def added_prefixes() -> tuple[str, ...]:
    """First parts of the state-dict keys that any reduction adds."""
    return tuple(dict.fromkeys(name for r in _reductions.values() for name in r.added))
