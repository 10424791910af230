"""`auto`: of the reductions that serve a host, the one that saves most, by counting."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tokenprune.analysis.reading import Reading
from tokenprune.cost.profile import profile
from tokenprune.errors import (
    PlanError,
    TokenPruneError,
    TokensReturnedError,
    UnsupportedHostError,
    VerificationError,
)
from tokenprune.notices import warn_once
from tokenprune.recipe import Recipe
from tokenprune.recipe.methods import list_methods, method_named
from tokenprune.recipe.names import MODES, recipe_of
from tokenprune.runtime.model import wrapper_of
from tokenprune.runtime.pruning import Pruning
from tokenprune.scorers import Matcher
from tokenprune.tracing.host_graph import explained
from tokenprune.tracing.randomness import torch_generators_kept

__all__ = ["CHOSEN", "LEAST", "RULE", "candidates", "choose"]

CLOSE = 0.02
LEAST = 0.05
"""Share of the dense MACs below which a host gains too little to be pruned in silence."""
CHOSEN = "auto chose"
"""Begins what the recipe of a model says of the choice."""
RULE = (
    f"auto takes what saves most of the MACs; of what is within {100 * CLOSE:g} points of that, "
    "first what needs no training, then what merges, then what has fewer stages."
)
LINE_OF_SOURCE = re.compile(r"[, ]*((at|in) )?(module '[^']*' )?\(?[^ ]*\.py:\d+.*$")
"""What a saved recipe does not need: a path on the machine where it was chosen."""

Refusals = Mapping[str, TokenPruneError]


class Wrapping(Protocol):
    """The parts of `wrap`."""

    @property
    def host(self) -> nn.Module:
        """What is wrapped."""

    def ways(self, recipe: Recipe) -> Sequence[Reading]:
        """The ways to read the host for a recipe."""

    def planned(self, recipe: Recipe, reading: Reading) -> Pruning:
        """What prunes the host, from a trace that all plans share."""

    def equip(self, pruning: Pruning) -> None:
        """Make the modules that pruning adds to the host."""

    def proven(self, pruning: Pruning) -> Any:
        """The wrapped model, verified."""


@dataclass(frozen=True)
class Option:
    """A recipe that serves a host.

    Attributes:
        recipe: One of `candidates`.
        pruning: What it makes of the host; not proven yet.
        saved: Share of the dense MACs.
        others: Other ways to read the host, not tried yet.
    """

    recipe: Recipe
    pruning: Pruning
    saved: float
    others: Iterator[Reading]

    @property
    def preference(self) -> tuple[bool, bool, int, float]:
        """What decides between options that save about the same; the smaller goes first."""
        method, stages = self.pruning.method, len(self.pruning.plan.sites)
        merges = Matcher in method.reduction.scorers
        return method.scorer.probabilistic, not merges, stages, -self.saved


def candidates(asked: Recipe) -> list[Recipe]:
    """What a recipe with `mode: auto` may become: the methods that name a mode, and each mode by
    itself, at its keep ratio and with what else it says."""
    ratio = asked.schedule.keep_ratio if asked.schedule else None
    chosen = {"mode", "scorer", "place", "schedule", "name"}
    said = asked.model_dump(mode="json", exclude_unset=True, exclude=chosen)
    found: list[Recipe] = []
    known: list[Recipe] = []
    for mapping in _mappings(ratio):
        recipe = Recipe.parse({**said, **mapping})
        unnamed = recipe.model_copy(update={"name": ""})
        if unnamed not in known and recipe.name not in {other.name for other in found}:
            found.append(recipe)
            known.append(unnamed)
    return found


def _mappings(ratio: float | None) -> Iterator[dict[str, Any]]:
    schedule, modes = {"keep_ratio": ratio}, [mode for mode in MODES if MODES[mode].prunes]
    for name in list_methods():
        method = method_named(name)
        if method is not None and "keep_ratio" in type(method).model_fields:
            mapping = recipe_of(type(method)(**schedule))
            if mapping.get("mode", "") in modes:
                yield mapping
    for mode in modes:
        yield {"version": 1, "name": f"{mode}-k{ratio:g}", "mode": mode, "schedule": schedule}


def choose(host: nn.Module, asked: Recipe, parts: Wrapping) -> Any:
    """The host, wrapped by the best of the candidates that is proven; the recipe of the model then
    says why. Warns where that saves less than `LEAST`.

    Args:
        asked: A recipe with `mode: auto`.
        parts: How that host is wrapped.

    Raises:
        TokenPruneError: No candidate serves the host, or an output holds tokens and nothing says
            what becomes of them.
    """
    options, refused = list[Option](), dict[str, TokenPruneError]()
    for recipe in candidates(asked):
        options += _option(recipe, iter(parts.ways(recipe)), parts, refused)
    while options:
        best = _best(options)
        options.remove(best)
        try:
            wrapped = parts.proven(best.pruning)
        except (PlanError, UnsupportedHostError, VerificationError) as error:
            refused[best.recipe.name] = error
            options += _option(best.recipe, best.others, parts, refused)
            continue
        told = in_words(best, options, refused)
        described = " ".join(filter(None, (asked.description, told)))
        of_model = best.pruning.recipe
        best.pruning.recipe = of_model.model_copy(update={"description": described})
        if best.saved < LEAST:
            _say_little(host, best)
        return wrapped
    raise _nothing_serves(type(host).__name__, refused)


def _option(
    recipe: Recipe, ways: Iterator[Reading], parts: Wrapping, refused: dict[str, TokenPruneError]
) -> list[Option]:
    """The plan of a recipe by the first way to read the host that has one; `refused` gets the first
    reason where none has."""
    first: TokenPruneError | None = None
    for reading in ways:
        try:
            with explained(parts.host):  # what a plan makes of the host may not run at all
                pruning = parts.planned(recipe, reading)
                saved = 1 - _share(pruning, parts)
        except TokensReturnedError:
            raise  # the caller is to say what becomes of them
        except (PlanError, UnsupportedHostError) as error:
            first = first or error
        else:
            return [Option(recipe, pruning, saved, ways)]
    if first is not None:
        refused.setdefault(recipe.name, first)
    return []


def _share(pruning: Pruning, parts: Wrapping) -> float:
    """The share of the dense MACs that a plan costs. Scorers are made for the count alone, so the
    owner's generators get their states back."""
    with torch_generators_kept():
        parts.equip(pruning)
        share = profile(wrapper_of(pruning)).ratio
    pruning.added.clear()
    return share


def _best(options: Sequence[Option]) -> Option:
    """The one that `RULE` takes."""
    most = max(option.saved for option in options)
    close = (option for option in options if option.saved >= most - CLOSE)
    return min(close, key=lambda option: option.preference)


def _say_little(host: nn.Module, best: Option) -> None:
    warn_once(
        host,
        "saves little",
        f"{best.recipe.name}, which auto chose, saves {100 * best.saved:.1f} % of the MACs of this "
        f"{type(host).__name__}. Keep it dense, or let more tokens leave: wrap(host, "
        '"auto-k0.5").',
    )


def in_words(chosen: Option, others: Iterable[Option], refused: Refusals) -> str:
    """What was chosen and why, in a sentence or two."""
    rest = sorted(others, key=lambda option: -option.saved)
    text = f"{CHOSEN} {_named(chosen)}: it saves {100 * chosen.saved:.1f} % of the MACs"
    if rest:
        saved = [f"{100 * option.saved:.1f} % by {_named(option)}" for option in rest]
        text += f", against {', '.join(saved)}"
    return ". ".join([text, *_reasons(refused)]) + "."


def _named(option: Option) -> str:
    training = " (to be trained)" if option.pruning.method.scorer.probabilistic else ""
    return f"{option.recipe.name}{training}"


def _reasons(refused: Refusals) -> list[str]:
    """A sentence for each reason, with the names of what it prevents."""
    groups: dict[str, tuple[list[str], str]] = {}
    for name, error in refused.items():
        first = re.split(r"(?<=[.:;]) (?=[A-Z])", str(error).splitlines()[0])[0]
        first = LINE_OF_SOURCE.sub("", first).rstrip(".:;")
        mode = re.sub(r"`mode: \w[\w-]*`|recipe '[^']*'", "", first)
        groups.setdefault(mode, ([], first))[0].append(name)
    return [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} refused: {reason}"
        for names, reason in groups.values()
    ]


def _nothing_serves(host: str, refused: Refusals) -> TokenPruneError:
    """The error where every candidate is refused: the one reason that all have, or all reasons."""
    reasons = _reasons(refused)
    if len(reasons) == 1:
        return next(iter(refused.values()))
    return PlanError("\n  - ".join([f"auto finds nothing that serves this {host}:", *reasons]))
