"""Models named on the command line: `NAME`, `timm:NAME`, `transformers:CLASS` or `:TYPE`."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from torch import nn

from tokenprune.errors import (
    HostError,
    MissingDependencyError,
    RecipeError,
    UnsupportedHostError,
    did_you_mean,
)
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


def build(
    name: str, options: Sequence[str] | Mapping[str, Any] = (), *, pretrained: bool = False
) -> nn.Module:
    """Build a host in eval mode.

    Args:
        name: As for `split_name`; for transformers a class or a model type.
        options: For timm's `create_model` or the configuration: by name, or as texts KEY=VALUE.
        pretrained: With the published weights; timm only, where a name stands for some.

    Raises:
        UnsupportedHostError: The library knows no such model; names the nearest.
        HostError: It cannot be built with these options.
        MissingDependencyError: The library is not installed.
    """
    library, model = split_name(name)
    keywords = dict(options) if isinstance(options, Mapping) else parse_options(options)
    if pretrained and library != "timm":
        raise HostError(
            f"{name!r} names no published weights; only names of timm do. Give a file of weights, "
            "or a checkpoint of tokenprune."
        )
    try:
        if library == "timm":
            return _timm(model, keywords, pretrained).eval()
        return _transformers(model, keywords).eval()
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise MissingDependencyError(
            f"{name!r} needs {library}, which is not installed. "
            f"Run: pip install 'tokenprune-torch[{library}]'"
        ) from error


def _timm(model: str, keywords: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    import tokenprune.models  # noqa: F401  registers lvvit_* with timm

    remote = ":" in model or "/" in model
    if not remote and not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models())
        if model.endswith(("Model", "Classification")):
            hint = f"For transformers write transformers:{model}."
        raise UnsupportedHostError(f"timm has no model named {model!r}. {hint}")
    try:
        built: nn.Module = timm.create_model(model, pretrained=pretrained, **keywords)
    except Exception as error:  # a library may refuse options in any way
        raise _cannot("timm", model, keywords, error) from error
    return built


def _transformers(model: str, keywords: dict[str, Any]) -> nn.Module:
    import transformers

    if model in transformers.CONFIG_MAPPING:
        config_class: Any = transformers.CONFIG_MAPPING[model]
        make: Any = transformers.AutoModelForImageClassification.from_config
    else:
        make = getattr(transformers, model, None)
        config_class = getattr(make, "config_class", None)
    if not isinstance(config_class, type):
        classes = [name for name in dir(transformers) if name.endswith("ForImageClassification")]
        raise UnsupportedHostError(
            f"transformers has no model class or type named {model!r}. "
            f"{did_you_mean(model, classes)}"
        )
    known: Any = config_class()  # takes any keyword, and keeps those it does not know as they are
    for key in keywords:
        if not hasattr(known, key):
            raise HostError(
                f"{config_class.__name__} has no option {key!r}. {did_you_mean(key, vars(known))}"
            )
    try:
        built: nn.Module = make(config_class(**keywords))
    except Exception as error:  # a library may refuse options in any way
        raise _cannot("transformers", model, keywords, error) from error
    return built


def _cannot(library: str, model: str, keywords: dict[str, Any], error: Exception) -> HostError:
    return HostError(
        f"{library} cannot build {model!r} with the options {keywords}: "
        f"{type(error).__name__}: {error}"
    )


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
