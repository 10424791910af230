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

__all__ = ["build", "host_of_folder", "host_section", "parse_options", "recipe_for", "split_name"]

DEFAULT_RATIO = 0.7


def split_name(name: str) -> tuple[str, str]:
    """Library and model of a name; timm if none is named."""
    library, colon, model = name.partition(":")
    # timm's own ways to name a remote model
    if not colon or "/" in library or library in ("hf-hub", "hf_hub", "local-dir"):
        return "timm", name
    if library not in ("timm", "transformers"):
        raise HostError(
            f"Models come from timm or transformers, found {library!r} in {name!r}. Write "
            "timm:deit_small_patch16_224 or transformers:ViTForImageClassification."
        )
    return library, model


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """`["depth=4", "img_size=[32, 32]"]` as a dict; values are YAML."""
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
    """The `host` section of a recipe for a model named on the command line."""
    library, model = split_name(name)
    mapping = {"library": library, "model": model, "kwargs": parse_options(options)}
    try:
        return HostSection.model_validate(mapping)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors())
        asked = f"{name!r} with options {list(options)}"
        raise HostError(f"{asked} names no host: {'; '.join(faults)}") from error


def host_of_folder(host: str, options: Sequence[str]) -> HostSection | None:
    """The `host` section that --host and --option describe; None without --host."""
    if options and not host:
        raise HostError("--option is for building a host; name it with --host.")
    return host_section(host, options) if host else None


def build(name: str, options: Sequence[str], *, pretrained: bool = False) -> nn.Module:
    """Build a host in eval mode; options are for timm's `create_model` or the configuration."""
    library, model = split_name(name)
    kwargs = parse_options(options)
    # not validated: here, unlike in a recipe, an option may be a mapping (`vision_config`)
    section = HostSection.model_construct(library=library, model=model, kwargs=kwargs)
    return build_host(section, pretrained=pretrained)


def recipe_for(name: str, spec: ArchSpec) -> Recipe | None:
    """The shipped recipe that a model is looked at with when none is named; None if there is none.

    That is the one that keeps 0.7 of the tokens of the published model of this name.
    """
    model = split_name(name)[1]
    for shipped in map(load_recipe, list_recipes()):
        host, stages = shipped.host, shipped.resolved_stages
        if host is None or host.model != model or host.kwargs or shipped.mode != spec.mode:
            continue
        if stages[-1].block < len(spec.blocks) and stages[0].keep_ratio == DEFAULT_RATIO:
            return shipped
    return None
