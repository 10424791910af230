"""Recipes: where a host is pruned and how its predictors are trained; the shipped ones by name."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, Self, TypeAlias

from pydantic import ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from tokenprune.errors import PlanError, RecipeError, UnknownRecipeError, did_you_mean
from tokenprune.recipe.methods import AUTO, Method
from tokenprune.recipe.names import MODES, SCORERS, named_recipe, named_recipes, recipe_of
from tokenprune.recipe.schema import (
    HostSection,
    LossSection,
    PredictorSection,
    SamplingSection,
    ScheduleSection,
    Section,
    Stage,
    Stages,
    TrainSection,
)
from tokenprune.recipe.yaml import dump_yaml, load_yaml

__all__ = ["Recipe", "RecipeSource", "list_recipes", "load_recipe"]

_VERSION = 1
_RECIPES = "tokenprune.recipes"

# pydantic's messages about Python types, in terms of YAML
_MESSAGES = {
    "dict_type": "should be a mapping of keys",
    "model_type": "should be a mapping of keys",
    "string_too_short": "should not be empty",
    "tuple_type": "should be a list",
}

_short = Repr()
_short.maxstring = _short.maxother = 60


class Recipe(Section):
    """A checked, immutable description of one way to prune and train a host.

    Make one with `parse`, `from_text`, `load` or `load_recipe`: these report every fault at once as
    `RecipeError`. The constructor itself raises pydantic's `ValidationError`.

    Attributes:
        version: of the format; always 1.
        name: `<method>-<host>-k<base ratio>` in shipped recipes.
        description: one line for `tokenprune recipes`.
        source: the paper or measurement that the recipe comes from.
        mode: `remove` gathers dropped tokens away; `bypass` keeps the grid, and dropped tokens skip
            the MLP; `fuse` lets them go on as one, their weighted sum; `merge` lets similar
            tokens become their mean; `windows` leaves whole windows of window attention out of
            its blocks; with `skip` tokens keep their value through MLPs and projections; `exact`
            prunes nothing, and needs `unread_rows`. `auto` is any of these but the last, and of
            those that others add: `wrap` takes what saves most on its host, which is then the
            recipe of the model.
        scorer: what says which tokens stay; `learned` is DynamicViT's predictor, `similarity` (the
            default of `merge`) ToMe's matching.
        unread_rows: do not compute rows (tokens) that nothing reads: queries, projection and MLP of
            the last block, for a head that reads the class token. Outputs and gradients are equal
            up to rounding. Nothing changes where all rows are read: by a mean over tokens, a hook,
            an output or a trace that holds tokens.
        place: where in its block a stage is: `entry`, or `middle` after attention's residual
            sum.
        stages: pruning points, blocks strictly increasing, ratios never growing.
        schedule: the short form, one ratio for several blocks; exactly one of the two is given.
            Without `blocks` the recipe fits any host: see `ScheduleSection`.
        predictor: see `PredictorSection`.
        sampling: see `SamplingSection`.
        loss: see `LossSection`.
        train: see `TrainSection`.
        host: see `HostSection`.
    """

    version: Literal[1] = 1
    name: str = ""
    description: str = ""
    source: str = ""
    mode: str = "remove"
    scorer: str = "learned"
    unread_rows: bool = False
    place: Literal["entry", "middle"] = "entry"
    stages: Stages | None = None
    schedule: ScheduleSection | None = None
    predictor: PredictorSection = PredictorSection()
    sampling: SamplingSection = SamplingSection()
    loss: LossSection = LossSection()
    train: TrainSection = TrainSection()
    host: HostSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_mode(cls, given: Any) -> Any:
        mode = given.get("mode") if isinstance(given, Mapping) else None
        if not (isinstance(mode, str) and mode in MODES):
            return given
        return {**MODES[mode].defaults, **given}

    @field_validator("mode", "scorer")
    @classmethod
    def _registered(cls, name: str, info: ValidationInfo) -> str:
        if info.field_name == "mode" and name == AUTO:
            return name
        registry = MODES if info.field_name == "mode" else SCORERS
        try:
            registry[name]
        except PlanError as error:
            raise ValueError(str(error)) from error
        return name

    @model_validator(mode="after")
    def _stages_or_schedule(self) -> Self:
        if problem := _choose_one(self.stages is not None, self.schedule is not None):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _open_for_auto(self) -> Self:
        given = self.schedule
        open_ = given is not None and given.keep_ratio and not (given.blocks or given.falling)
        own = (self.scorer, self.place) == ("learned", "entry")
        if self.is_open and not (open_ and own):
            raise ValueError(
                f"`mode: {AUTO}` chooses scorer, place and stages as well; give it "
                "`schedule: {keep_ratio: 0.7}` alone, or name a mode"
            )
        return self

    @property
    def is_open(self) -> bool:
        """`wrap` is to choose the mode, and what goes with it."""
        return self.mode == AUTO

    @property
    def resolved_stages(self) -> tuple[Stage, ...]:
        """The stages, whichever of `stages` and `schedule` the recipe gives; none if it leaves
        the blocks to the host."""
        return self.schedule.stages if self.schedule else self.stages or ()

    def with_stages(self, blocks: Sequence[int], keep_ratios: Sequence[float]) -> Self:
        """This recipe with a stage before each of `blocks`, in place of its own stages.

        Raises:
            RecipeError: blocks do not increase, or a ratio grows or is out of range.
        """
        pairs = zip(blocks, keep_ratios, strict=True)
        stages = [{"block": block, "keep_ratio": ratio} for block, ratio in pairs]
        mapping = self.model_dump(mode="json", exclude_none=True, exclude={"schedule"})
        return self.parse({**mapping, "stages": stages})

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], where: str = "the recipe") -> Self:
        """Check a mapping of recipe keys.

        Args:
            mapping: what a recipe file holds.
            where: what to call the mapping in an error message.

        Raises:
            RecipeError: the mapping is not a recipe of this version; lists every fault with its
                key path.
        """
        if not isinstance(mapping, Mapping):
            raise RecipeError(
                "A recipe must be a mapping of keys such as `version` and `stages`, "
                f"found {type(mapping).__name__} in {where}. Write "
                "{version: 1, schedule: {keep_ratio: 0.7}}, or more."
            )
        version = mapping.get("version")
        if type(version) is not int or version != _VERSION:
            found = f"version {version!r}" if "version" in mapping else "no `version` key"
            raise RecipeError(
                f"Found {found} in {where}; this release reads `version: {_VERSION}` only. "
                "Compare the recipe with the shipped ones, then set the version."
            )
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            problems = list(_problems(error, mapping))
        count = "is 1 fault" if len(problems) == 1 else f"are {len(problems)} faults"
        raise RecipeError(f"There {count} in {where}:", problems)

    @classmethod
    def from_text(cls, text: str, where: str = "the recipe") -> Self:
        """Read a recipe from YAML text.

        Raises:
            RecipeError: the text is not YAML (tags and repeated keys included) or not a recipe.
        """
        return cls.parse(load_yaml(text, where), where)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe file.

        Raises:
            RecipeError: the file cannot be read, or what it holds is not a recipe.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RecipeError(
                f"There is no recipe file {os.fspath(path)!r}. Give a shipped recipe by its name, "
                "without folder and ending; tokenprune.list_recipes() shows the names."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"Cannot read recipe file {os.fspath(path)!r}: {error}. Name a text file that may "
                "be read."
            ) from error
        return cls.from_text(text, where=f"recipe file {os.fspath(path)!r}")

    def to_yaml(self) -> str:
        """The whole recipe as YAML text, defaults written out; `from_text` gives it back."""
        return dump_yaml(self.model_dump(mode="json", exclude_none=True))


_SECTIONS: dict[str, type[Section]] = {
    "stages": Stage,
    "schedule": ScheduleSection,
    "predictor": PredictorSection,
    "sampling": SamplingSection,
    "loss": LossSection,
    "train": TrainSection,
    "host": HostSection,
}

RecipeSource: TypeAlias = Recipe | Method | str | os.PathLike[str] | Mapping[str, Any]


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted; those that fit any host last, with the ratio 0.7."""
    return [*_shipped_files(), *named_recipes()]


def _shipped_files() -> list[str]:
    names = (entry.name for entry in files(_RECIPES).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(source: RecipeSource) -> Recipe:
    """Turn what `wrap` accepts into a `Recipe`.

    Args:
        source: a `Recipe`; a `Method`; a mapping of a recipe's keys; a path; or a text, which is a
            path if it ends in `.yaml` or `.yml` or holds a path separator, and otherwise the name
            of a shipped recipe or of a method.

    Raises:
        RecipeError: the recipe cannot be read; lists every fault.
        UnknownRecipeError: no shipped recipe has that name; names the nearest.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Method):
        return Recipe.parse(recipe_of(source), where=f"method {source.name!r}")
    if isinstance(source, Mapping):
        return Recipe.parse(source)
    if isinstance(source, os.PathLike):
        return Recipe.load(source)
    if not isinstance(source, str):
        raise RecipeError(
            "A recipe is given as a name, a method, a path, a mapping or a Recipe, "
            f"found {type(source).__name__}. Pass one of these, such as 'merge-k0.7'."
        )
    if source.endswith((".yaml", ".yml")) or "/" in source or os.sep in source:
        return Recipe.load(source)
    if source not in _shipped_files():
        named = named_recipe(source)
        if named is not None:
            return Recipe.parse(named, where=f"recipe {source!r}")
        hint = did_you_mean(source, list_recipes())
        raise UnknownRecipeError(f"No recipe is named {source!r}. {hint}")
    text = files(_RECIPES).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    return Recipe.from_text(text, where=f"recipe {source!r}")


def _choose_one(has_stages: bool, has_schedule: bool) -> str | None:
    found = "both" if has_stages else "neither"
    fault = f"give exactly one of `stages` and `schedule`, found {found}"
    return fault if has_stages == has_schedule else None


def _problems(error: ValidationError, mapping: Mapping[str, Any]) -> Iterator[str]:
    details = error.errors(include_url=False)
    for detail in details:
        path = ".".join(map(str, detail["loc"]))
        yield f"{path}: {_problem(detail)}" if path else _problem(detail)
    if all(detail["loc"] for detail in details):
        # pydantic skips the check of the whole when a part fails
        given = (mapping.get(key) is not None for key in ("stages", "schedule"))
        if problem := _choose_one(*given):
            yield problem


def _where_it_belongs(key: str, found_in: type[Section]) -> str:
    """A sentence for a key that is one of another part of a recipe."""
    if found_in is not Recipe and key in Recipe.model_fields:
        return f"Put `{key}` at the top level, beside `{_name_of(found_in)}`."
    homes = [name for name, section in _SECTIONS.items() if key in section.model_fields]
    return f"Put it into `{homes[0]}`: {{{homes[0]}: {{{key}: ...}}}}." if len(homes) == 1 else ""


def _name_of(section: type[Section]) -> str:
    return next(name for name, known in _SECTIONS.items() if known is section)


def _problem(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        *parents, key = detail["loc"]
        section = _SECTIONS[str(parents[0])] if parents else Recipe
        hint = did_you_mean(str(key), section.model_fields)
        return f"unknown key. {_where_it_belongs(str(key), section) or hint}"
    if detail["type"] == "missing":
        return "this key is missing"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    message = _MESSAGES.get(detail["type"]) or detail["msg"].replace("Input should", "should")
    return f"{message}, found {_short.repr(detail['input'])}"
