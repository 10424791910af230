"""Methods that fit any host; `tokenprune.methods` to users.

Each is a frozen object that makes a recipe, and has a name that `wrap`, recipes and the command
line take as well: `tome-r13`. Another package adds its own with `register_method`, and names it in
the entry-point group `tokenprune.methods`.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenprune.errors import RecipeError
from tokenprune.registry import Registry

__all__ = [
    "Auto",
    "DynamicViT",
    "EViT",
    "Exact",
    "KeyNorm",
    "Learned",
    "Merge",
    "MergeFalling",
    "Method",
    "Random",
    "Similarity",
    "Skip",
    "ToMe",
    "TokenNorm",
    "TopK",
    "Windows",
    "WindowsFalling",
    "list_methods",
    "method_named",
    "register_method",
]

ENTRY_POINTS = "tokenprune.methods"
AUTO = "auto"
"""The `mode` of a recipe that leaves it to `wrap`, which counts what each saves on its host."""
NAME = re.compile(r"(?P<method>.+)-(?P<letter>[a-z])(?P<value>\d*\.?\d+)")

KeepRatio = Annotated[float, Field(gt=0, le=1)]


class Method(BaseModel):
    """Base of methods: fields are checked, and never change.

    Attributes:
        registered: What it is called without its number; set by `register_method`.
        letter: The letter of a name, such as the k of `random-k0.7`, and the field it stands for;
            None where names have no number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    registered: ClassVar[str] = ""
    letter: ClassVar[tuple[str, str] | None] = ("k", "keep_ratio")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            found = error.errors(include_url=False)
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found]
            asked = ", ".join(f"{name}={value!r}" for name, value in fields.items())
            raise RecipeError(f"{type(self).__name__}({asked}) is no method:", problems) from None

    @property
    def name(self) -> str:
        """Its name, number included."""
        if self.letter is None:
            return self.registered
        letter, field = self.letter
        return f"{self.registered}-{letter}{getattr(self, field):g}"

    def recipe(self) -> dict[str, Any]:
        """The keys of a recipe that say what it does, without `version` and `name`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its recipe is")


M = TypeVar("M", bound=type[Method])


class _Methods(Registry[type[Method]]):
    """Each method knows its name."""

    def register(
        self, name: str, *, replace: bool = False
    ) -> Callable[[type[Method]], type[Method]]:
        add = super().register(name, replace=replace)

        def named(method: type[Method]) -> type[Method]:
            add(method).registered = name
            return method

        return named


_METHODS = _Methods("method", group=ENTRY_POINTS)


def register_method(name: str, *, replace: bool = False) -> Callable[[M], M]:
    """Class decorator: make a method known by a name.

    Args:
        name: Without its number: `tome` of `tome-r13`.
        replace: Put it in the place of another of that name.

    Raises:
        RegistrationError: The name is taken, and `replace` is False.
    """

    def add(method: M) -> M:
        _METHODS.register(name, replace=replace)(method)
        return method

    return add


def list_methods() -> list[str]:
    """A name for each method, with the number it has if none is given."""
    return sorted(method().name for method in _METHODS.values())


def method_named(name: str) -> Method | None:
    """The method of a name such as `tome-r13`; None if there is none."""
    if name in _METHODS:  # without a number, if it has none, or none by default
        bare = _METHODS[name]()
        return bare if bare.name == name else None
    match = NAME.fullmatch(name)
    if match is None or match["method"] not in _METHODS:
        return None
    method = _METHODS[match["method"]]
    if method.letter is None or method.letter[0] != match["letter"]:
        return None
    field = method.letter[1]
    text = match["value"]
    try:
        return method(**{field: float(text) if "." in text else int(text)})
    except RecipeError:
        return None


class _Keeping(Method):
    """Three stages, each of which keeps a share of what it sees."""

    keep_ratio: KeepRatio = 0.7
    parts: ClassVar[dict[str, str]] = {}

    def recipe(self) -> dict[str, Any]:
        return {**self.parts, "schedule": {"keep_ratio": self.keep_ratio}}


@register_method(AUTO)
class Auto(_Keeping):
    """Whichever of the reductions saves most on a host at this ratio, by counting; `auto` alone
    keeps 0.7."""

    parts = {"mode": AUTO}

    @property
    def name(self) -> str:
        """Without its number, if that is the default."""
        default = type(self).model_fields["keep_ratio"].default
        return self.registered if self.keep_ratio == default else super().name


@register_method("dynamicvit")
class DynamicViT(_Keeping):
    """Predictors that learn which tokens to keep (Rao et al., 2021). The one that needs training:
    what `wrap(model)` does."""

    parts = {"scorer": "learned"}


@register_method("learned")
class Learned(_Keeping):
    """The same predictors, whose scores get the same noise in training and in eval, spread evenly
    over the tokens (`sampling.noise: spread`): they learn in fewer steps."""

    parts = {"scorer": "learned"}

    def recipe(self) -> dict[str, Any]:
        return {**super().recipe(), "sampling": {"noise": "spread"}}


@register_method("evit")
class EViT(_Keeping):
    """The tokens that the class token attends to most, and the sum of the others (Liang et al.,
    2022). The share is of the tokens that a stage sees, rounded up, beside the fused one."""

    parts = {"mode": "fuse"}


@register_method("topk")
class TopK(_Keeping):
    """The tokens that the class token attends to most; the others leave."""

    parts = {"scorer": "class-attention"}


@register_method("merge")
class Merge(_Keeping):
    """Similar tokens become their mean, at three blocks: ToMe's matching in larger steps."""

    parts = {"mode": "merge"}


class _Falling(_Keeping):
    """A stage at every block, fewer tokens leave at each than at the one before; as many are left
    in the end as with three stages of this ratio."""

    def recipe(self) -> dict[str, Any]:
        return {**self.parts, "schedule": {"keep_ratio": self.keep_ratio, "falling": True}}


@register_method("merge-falling")
class MergeFalling(_Falling):
    """The same at every block, fewer in each than in the one before; as many tokens are left in the
    end as with `Merge` of this ratio."""

    parts = {"mode": "merge"}


@register_method("tome")
class ToMe(Method):
    """The same, `r` tokens in every block (Bolya et al., 2023)."""

    letter: ClassVar[tuple[str, str] | None] = ("r", "r")
    r: Annotated[int, Field(ge=1)] = 13

    def recipe(self) -> dict[str, Any]:
        return {"mode": "merge", "schedule": {"r": self.r}}


@register_method("random")
class Random(_Keeping):
    """Random tokens, drawn again in every call: the baseline."""

    parts = {"scorer": "random"}


@register_method("token-norm")
class TokenNorm(_Keeping):
    """The tokens with the largest norm."""

    parts = {"scorer": "token-norm"}


@register_method("key-norm")
class KeyNorm(_Keeping):
    """The tokens with the smallest keys."""

    parts = {"scorer": "key-norm"}


@register_method("similarity")
class Similarity(_Keeping):
    """Tokens that are similar to another one leave, instead of being merged with it."""

    parts = {"scorer": "similarity"}


@register_method("exact")
class Exact(Method):
    """Every token stays; rows that no output reads are not computed (`unread_rows`)."""

    letter: ClassVar[tuple[str, str] | None] = None

    def recipe(self) -> dict[str, Any]:
        return {"mode": "exact", "unread_rows": True, "schedule": {"keep_ratio": 1.0}}


@register_method("skip")
class Skip(_Keeping):
    """The tokens with the smallest norm keep their value through MLPs and projections, while others
    still read them: on every grid of a host, more of them in each block than in the one before. As
    many tokens are left in the end as with `Merge` of this ratio."""

    parts = {"mode": "skip"}


@register_method("windows")
class Windows(_Keeping):
    """The windows whose tokens have the largest norm, the same share of those of each grid; the
    others leave attention and MLP of all blocks of that grid (SparseViT: Chen et al., 2023)."""

    parts = {"mode": "windows", "scorer": "token-norm"}


@register_method("windows-falling")
class WindowsFalling(_Falling):
    """The same with a stage at every block that attends in windows: the share of windows that run
    falls to the cube of this ratio."""

    parts = Windows.parts
