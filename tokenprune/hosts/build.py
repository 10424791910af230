"""Hosts by the `host` section of a recipe: build them, and find out which images they take.

A model library is imported when a host of it is asked for, not before.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.errors import (
    HostError,
    MissingDependencyError,
    TokenPruneError,
    UnsupportedHostError,
    did_you_mean,
)
from tokenprune.recipe.schema import HostSection

__all__ = ["build_host", "input_settings", "model_library", "names_files"]

ANY_SIZE = 224  # of hosts that do not say which they take


def build_host(
    section: HostSection,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    in_chans: int | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a dense host, in eval mode.

    Args:
        section: `host` of a recipe. `model` is a timm name; or a model type (`vit`), a model class
            or a checkpoint of transformers. What is None below is left to `kwargs` and the model.
        num_classes: Outputs of the head, which is random where a checkpoint has another number.
        image_size: Side in pixels.
        pretrained: Load the published weights.
        in_chans: Channels of an image.
        drop_path: Stochastic depth of the last block.

    Raises:
        MissingDependencyError: The library is not installed.
        UnsupportedHostError: The library knows no such model; names the nearest.
        HostError: The library cannot build it with these options.
    """
    build = {"timm": _timm_host, "transformers": _transformers_host}[section.library]
    asked = {
        "num_classes": num_classes,
        "img_size": image_size,
        "in_chans": in_chans,
        "drop_path_rate": drop_path or None,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    try:
        host: nn.Module = build(section, asked, pretrained)
        return host.eval()
    except TokenPruneError:
        raise
    except Exception as error:  # a library may refuse options in any way
        given = f"the options {dict(section.kwargs) | asked}, pretrained={pretrained}"
        raise HostError(
            f"{section.library} cannot build {section.model!r} with {given}: "
            f"{type(error).__name__}: {error}. Change the options, or give none."
        ) from error


def input_settings(
    section: HostSection, image_size: int | None = None, pretrained: bool = False
) -> dict[str, Any]:
    """How images must look for a host: the keyword arguments of `load_data`.

    Args:
        section: `host` of a recipe.
        image_size: Side in pixels; None for what the host takes by itself.
        pretrained: Normalise as the published weights were trained; otherwise to mean and standard
            deviation 0.5.

    Raises:
        MissingDependencyError: The library is not installed.
        UnsupportedHostError: The library knows no such model.
    """
    timm = section.library == "timm"
    settings = _timm_settings(section) if timm else _transformers_settings(section, pretrained)
    if image_size is not None:
        settings["image_size"] = image_size
    if not pretrained:
        half = (0.5,) * int(settings["in_chans"])
        settings |= {"mean": half, "std": half}
    return settings


def model_library(name: str, wanted: str) -> Any:
    """timm or transformers, for a model of it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingDependencyError(
            f"{wanted!r} needs {name}, which is not installed. "
            f"Run: pip install 'tokenprune-torch[{name}]'"
        ) from error


def names_files(section: HostSection) -> bool:
    """Whether `model` is a path or a repository, and no name that the library itself knows."""
    model = section.model
    if not {"/", "\\", ":"}.isdisjoint(model):
        return True
    if section.library == "timm" or not Path(model).is_dir():
        return False
    return model not in _library(section).CONFIG_MAPPING


def _library(section: HostSection) -> Any:
    return model_library(section.library, section.model)


def _timm(section: HostSection) -> Any:
    """timm, with the models of this library; raises if it does not have the section's model."""
    timm, model = _library(section), section.model
    import tokenprune.models  # noqa: F401  registers lvvit_* with timm

    if ":" not in model and not timm.is_model(model):
        hint = did_you_mean(model, timm.list_models())
        if model.endswith(("Model", "Classification")):
            hint = f"For transformers write transformers:{model}."
        raise UnsupportedHostError(f"timm has no model named {model!r}. {hint}")
    return timm


def _timm_host(section: HostSection, asked: Mapping[str, Any], pretrained: bool) -> Any:
    create = _timm(section).create_model
    options = {**section.kwargs, **asked}
    try:
        return create(section.model, pretrained=pretrained, **options)
    except TypeError as error:
        # hosts without a position table take images of any size, and no option for it
        if "img_size" not in asked or "unexpected keyword argument 'img_size'" not in str(error):
            raise
    del options["img_size"]
    return create(section.model, pretrained=pretrained, **options)


def _timm_settings(section: HostSection) -> dict[str, Any]:
    known = _timm(section).get_pretrained_cfg(section.model)
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=known.to_dict() if known else {}, verbose=False)
    channels, height, _ = config["input_size"]
    size = section.kwargs.get("img_size", height)
    return {
        "image_size": int(size[0] if isinstance(size, list) else size),
        "in_chans": int(section.kwargs.get("in_chans", channels)),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "crop_pct": float(config["crop_pct"]),
        "interpolation": str(config["interpolation"]),
    }


def _transformers_host(section: HostSection, asked: Mapping[str, Any], pretrained: bool) -> Any:
    config, build = _config(section, pretrained)
    vision = getattr(config, "vision_config", config)
    if "num_classes" in asked:
        config.num_labels = asked["num_classes"]
    if "in_chans" in asked:
        vision.num_channels = asked["in_chans"]
    if "img_size" in asked:
        vision.image_size = asked["img_size"]
    if rate := asked.get("drop_path_rate"):
        if not hasattr(vision, "drop_path_rate"):
            raise HostError(
                f"{type(config).__name__} has no stochastic depth, but drop_path={rate} was asked. "
                "Set train.drop_path to 0."
            )
        vision.drop_path_rate = rate
    if not pretrained:
        # None breaks the choice where a type has several classes (DeiT); empty means the first
        config.architectures = config.architectures or []
        return build(config)
    host, report = _library(section).AutoModelForImageClassification.from_pretrained(
        section.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    refused = [key for key, *_ in report["mismatched_keys"] if "classifier" not in key]
    if refused:
        raise HostError(
            f"The checkpoint {section.model!r} has other shapes for {sorted(refused)[:5]}; "
            "transformers would draw them at random. Ask for the image size and channels it was "
            "trained with."
        )
    return host


def _config(section: HostSection, pretrained: bool) -> tuple[Any, Callable[[Any], nn.Module]]:
    """The configuration of a host of transformers, and what builds it with random weights."""
    library, model = _library(section), section.model
    types, build = library.CONFIG_MAPPING, library.AutoModelForImageClassification.from_config
    unknown = f"transformers has no model type, class or checkpoint {model!r}."
    if model not in types and ("/" in model or Path(model).is_dir()):
        try:
            known = config = library.AutoConfig.from_pretrained(
                model, trust_remote_code=False, **section.kwargs
            )
        except (OSError, ValueError) as error:
            raise UnsupportedHostError(
                f"{unknown} {error} Check the name, or name a folder that save_pretrained wrote."
            ) from error
    else:
        if model not in types:
            build = getattr(library, model, None)
        kind = types[model] if model in types else getattr(build, "config_class", None)
        if not isinstance(kind, type):
            classes = [name for name in dir(library) if name.endswith("ForImageClassification")]
            raise UnsupportedHostError(f"{unknown} {did_you_mean(model, [*types, *classes])}")
        if pretrained:
            raise UnsupportedHostError(
                f"'transformers:{model}' names no published weights: it is a model type or class. "
                "Name a checkpoint, such as 'google/vit-base-patch16-224', or start from random "
                "weights (pretrained=False)."
            )
        # takes any keyword, and keeps those it does not know as they are
        known, config = kind(), kind(**section.kwargs)
    for key in section.kwargs:
        if not hasattr(known, key) and not hasattr(known, f"_{key}"):
            raise HostError(
                f"{type(known).__name__} has no option {key!r}. {did_you_mean(key, vars(known))}"
            )
    return config, build


def _transformers_settings(section: HostSection, pretrained: bool) -> dict[str, Any]:
    config, _ = _config(section, pretrained)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or ANY_SIZE
    settings: dict[str, Any] = {
        "image_size": int(size if isinstance(size, int) else size[0]),
        "in_chans": int(getattr(vision, "num_channels", 3)),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    if pretrained:
        processor = _library(section).AutoImageProcessor.from_pretrained(section.model)
        settings |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    return settings
