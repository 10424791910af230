"""Dense hosts named on the command line.

A name is one of timm, with or without `timm:`; `transformers:` and a type, class or checkpoint; a
folder or `config.json` that timm or transformers wrote; or `module:function`, of one's own code.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from tokenprune.errors import HostError, RecipeError
from tokenprune.hosts.build import build_host
from tokenprune.hosts.files import host_of_files, is_host_files
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.recipe.schema import HostSection
from tokenprune.recipe.yaml import load_yaml

__all__ = ["build", "host_section", "is_function", "parse_options", "recipe_for", "split_name"]

DEFAULT_RATIO = 0.7
# timm's own ways to name a remote model
REMOTE = ("hf-hub", "hf_hub", "local-dir")


def split_name(name: str) -> tuple[str, str]:
    """Library and model of a name; timm if none is named.

    Raises:
        HostError: Another library is named.
    """
    library, colon, model = name.partition(":")
    if not colon or "/" in library or library in REMOTE:
        return "timm", name
    if library not in ("timm", "transformers"):
        raise HostError(
            f"Models come from timm or transformers, found {library!r} in {name!r}. Write "
            "timm:deit_small_patch16_224 or transformers:ViTForImageClassification; or, where it "
            "is only looked at, a function that returns the model, as module:function."
        )
    return library, model


def is_function(name: str) -> bool:
    """Whether a name is `module:function` or `file.py:function`, and there is such a module."""
    module, colon, function = name.rpartition(":")
    if not colon or module in ("timm", "transformers", *REMOTE) or not function.isidentifier():
        return False
    if module.endswith(".py"):
        return Path(module).is_file()
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    _see_this_folder()
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """`["depth=4", "img_size=[32, 32]"]` as a dict; values are YAML."""
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise HostError(
                f"An option is written KEY=VALUE, found {text!r}. Write it so: img_size=32."
            )
        try:
            options[key] = load_yaml(value, f"option {key}")
        except RecipeError as error:
            raise HostError(
                f"The value of option {text!r} cannot be read: {error}. Write it as in YAML, such "
                "as depths=[2,2]."
            ) from error
    return options


def host_section(name: str, options: Sequence[str]) -> HostSection:
    """The `host` section of a recipe for a model of timm or transformers."""
    library, model = split_name(name)
    mapping = {"library": library, "model": model, "kwargs": parse_options(options)}
    try:
        return HostSection.model_validate(mapping)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors())
        asked = f"{name!r} with options {list(options)}"
        raise HostError(
            f"{asked} names no host: {'; '.join(faults)}. Write timm:NAME or transformers:NAME, "
            "and plain values."
        ) from error


def build(name: str, options: Sequence[str], *, pretrained: bool = False) -> nn.Module:
    """Build a host in eval mode.

    Args:
        name: As above.
        options: `KEY=VALUE` for timm's `create_model`, the configuration or the function.
        pretrained: Load published weights; a folder has its own.

    Raises:
        HostError: The name, the options and `pretrained` do not go together.
        UnsupportedHostError: The library knows no such model.
    """
    kwargs = parse_options(options)
    if is_function(name) or is_host_files(Path(name)):
        if pretrained:
            raise HostError(
                f"--pretrained is for models of timm or transformers by name; {name!r} has its own "
                "weights. Leave it out."
            )
        return _called(name, kwargs) if is_function(name) else host_of_files(Path(name), kwargs)
    library, model = split_name(name)
    # not validated: here, unlike in a recipe, an option may be a mapping (`vision_config`)
    section = HostSection.model_construct(library=library, model=model, kwargs=kwargs)
    return build_host(section, pretrained=pretrained)


def _called(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """What a function of the owner's code returns."""
    path, _, function = name.rpartition(":")
    _see_this_folder()
    if path.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None  # noqa: S101 - is_function has seen the file
        assert spec.loader is not None  # noqa: S101
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # so that its classes can be pickled and traced
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(path)
    make = getattr(module, function, None)
    if not callable(make):
        raise HostError(f"{path!r} has no function {function!r}. Name one that returns the model.")
    try:
        host = make(**kwargs)
    except TypeError as error:
        raise HostError(
            f"{name} cannot be called with {kwargs}: {error}. Give its arguments as KEY=VALUE."
        ) from error
    if not isinstance(host, nn.Module):
        raise HostError(
            f"{name} returned {type(host).__name__}, where a torch.nn.Module is needed. Name a "
            "function that returns the model."
        )
    return host.eval()


def _see_this_folder() -> None:
    """A command does not look for modules in the current folder, where the owner's are."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def recipe_for(name: str, spec: ArchSpec) -> Recipe | None:
    """The shipped recipe that a model is looked at with when none is named; None if there is none.

    That is the one that keeps 0.7 of the tokens of the published model of this name.
    """
    if is_function(name) or is_host_files(Path(name)):
        return None
    model = split_name(name)[1]
    for shipped in map(load_recipe, list_recipes()):
        host, stages = shipped.host, shipped.resolved_stages
        if host is None or host.model != model or host.kwargs or shipped.mode != spec.mode:
            continue
        if stages[-1].block < len(spec.blocks) and stages[0].keep_ratio == DEFAULT_RATIO:
            return shipped
    return None
