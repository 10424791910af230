"""Models named on the command line: `NAME`, `timm:NAME`, or `transformers:` and a type, class or
checkpoint."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from tokenprune.errors import HostError, RecipeError
from tokenprune.hosts.build import build_host
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.recipe.schema import HostSection
from tokenprune.recipe.yaml import load_yaml

__all__ = ["build", "host_section", "parse_options", "recipe_for", "split_name"]

DEFAULT_RATIO = 0.7


def split_name(name: str) -> tuple[str, str]:
    """Library and model of a name; timm if none is named.

    Raises:
        HostError: There is no such library.
    """
    library, colon, model = name.partition(":")
    if not colon or "/" in library:  # "hf-hub:..." is timm's own way to name a remote model
        return "timm", name
    if library in ("hf-hub", "hf_hub", "local-dir"):
        return "timm", name
    if library not in ("timm", "transformers"):
        raise HostError(
            f"Models come from timm or transformers, found {library!r} in {name!r}. Write "
            "timm:deit_small_patch16_224 or transformers:ViTForImageClassification."
        )
    return library, model


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """`["depth=4", "img_size=[32, 32]"]` as a dict; values are YAML.

    Raises:
        HostError: One has no `=`, or its value is not YAML.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise HostError(f"An option is written KEY=VALUE, such as img_size=32; found {text!r}.")
        try:
            options[key] = load_yaml(value, f"option {key}")
        except RecipeError as error:
            raise HostError(f"The value of option {text!r} cannot be read: {error}") from error
    return options


def host_section(name: str, options: Sequence[str]) -> HostSection:
    """The `host` section of a recipe for a model named on the command line.

    Raises:
        HostError: The name or an option cannot be read.
    """
    library, model = split_name(name)
    mapping = {"library": library, "model": model, "kwargs": parse_options(options)}
    try:
        return HostSection.model_validate(mapping)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise HostError(f"{name!r} with options {list(options)} names no host: {faults}") from error


def build(name: str, options: Sequence[str], *, pretrained: bool = False) -> nn.Module:
    """Build a host in eval mode.

    Args:
        name: As for `split_name`.
        options: Texts KEY=VALUE for timm's `create_model` or the configuration.
        pretrained: With the published weights.

    Raises:
        MissingDependencyError: The library is not installed.
        UnsupportedHostError: The library knows no such model; names the nearest.
        HostError: It cannot be built with these options.
    """
    library, model = split_name(name)
    # not validated: here, unlike in a recipe, an option may be a mapping (`vision_config`)
    section = HostSection.model_construct(
        library=library, model=model, kwargs=parse_options(options)
    )
    return build_host(section, pretrained=pretrained)


def recipe_for(name: str, spec: ArchSpec) -> Recipe | None:
    """The shipped recipe that a model is looked at with when none is named; None if there is none.

    That is the one that keeps 0.7 of the tokens of the published model of this name.
    """
    model = split_name(name)[1]
    for shipped in map(load_recipe, list_recipes()):
        stages = shipped.resolved_stages
        fits = shipped.mode == spec.mode and stages[-1].block < len(spec.blocks)
        plain = shipped.host and shipped.host.model == model and not shipped.host.kwargs
        if plain and fits and stages[0].keep_ratio == DEFAULT_RATIO:
            return shipped
    return None
