"""Hosts by the `host` section of a recipe, and what their two libraries do differently."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import HostError, PlanError, UnsupportedHostError, did_you_mean
from tokenprune.recipe.schema import HostSection

__all__ = ["build_host", "class_logits", "input_settings"]

ANY_SIZE = 224  # of hosts that do not say which they take
# What a library raises when it cannot build a model from the options it is given.
_REFUSALS = (
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def build_host(
    section: HostSection,
    num_classes: int,
    image_size: int | None = None,
    pretrained: bool = False,
    in_chans: int = 3,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build the dense host a recipe is meant for.

    Args:
        section: `host` of a recipe. `model` is a timm name; or a transformers checkpoint or,
            without `pretrained`, a model type such as `vit`.
        num_classes: Outputs of the head, which is drawn anew where a checkpoint has another number.
        image_size: Side in pixels; None for what the host takes by itself.
        pretrained: Load the published weights.
        in_chans: Channels of an image.
        drop_path: Stochastic depth of the last block.

    Raises:
        UnsupportedHostError: The library knows no such model.
        HostError: The library cannot build it with these options.
    """
    build = {"timm": _timm_host, "transformers": _transformers_host}[section.library]
    wanted = {"num_classes": num_classes, "image_size": image_size, "in_chans": in_chans}
    try:
        return build(section, wanted, pretrained, drop_path)
    except (HostError, UnsupportedHostError):
        raise
    except _REFUSALS as error:
        asked = {name: value for name, value in wanted.items() if value is not None}
        raise HostError(
            f"{section.library} cannot build {section.model!r} with {asked}, "
            f"pretrained={pretrained} and the recipe's host.kwargs {dict(section.kwargs)}: "
            f"{type(error).__name__}: {error}"
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
        UnsupportedHostError: The library knows no such model.
    """
    if section.library == "timm":
        settings = _timm_settings(section)
    else:
        settings = _transformers_settings(section, pretrained)
    if image_size is not None:
        settings["image_size"] = image_size
    if not pretrained:
        half = (0.5,) * int(settings["in_chans"])
        settings |= {"mean": half, "std": half}
    return settings


def class_logits(output: Any, num_classes: int) -> Tensor:
    """The class logits [B, C] in what a host returned: a tensor, a tuple or a transformers output.

    Raises:
        HostError: There are none.
        PlanError: Their number is not that of the classes in the data.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = (
            f"a tensor {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(output).__name__
        )
        raise HostError(
            f"Training needs class logits [B, C], the host returned {found}. Use the host's class "
            "with a classification head."
        )
    if logits.shape[1] != num_classes:
        raise PlanError(
            f"The data has {num_classes} classes, but the host's head has {logits.shape[1]} "
            f"outputs. Build the host with num_classes={num_classes}, or use the data it was "
            "trained for."
        )
    return logits


def _timm_host(
    section: HostSection, wanted: Mapping[str, Any], pretrained: bool, drop_path: float
) -> nn.Module:
    import timm

    _check_timm_name(section.model)
    options: dict[str, Any] = dict(section.kwargs)
    options |= {"num_classes": wanted["num_classes"], "in_chans": wanted["in_chans"]}
    if wanted["image_size"] is not None:
        options["img_size"] = wanted["image_size"]
    if drop_path:
        options["drop_path_rate"] = drop_path
    make = partial(timm.create_model, section.model, pretrained=pretrained)
    try:
        host: nn.Module = make(**options)
    except TypeError as error:
        if "unexpected keyword argument 'img_size'" not in str(error):
            raise
        host = make(**{key: value for key, value in options.items() if key != "img_size"})
    return host


def _check_timm_name(name: str) -> None:
    import timm

    import tokenprune.models  # noqa: F401  registers lvvit_* with timm

    remote = ":" in name or "/" in name
    if not remote and not timm.is_model(name):
        raise UnsupportedHostError(
            f"timm has no model named {name!r}. {did_you_mean(name, timm.list_models())}"
        )


def _timm_settings(section: HostSection) -> dict[str, Any]:
    import timm
    from timm.data import resolve_data_config

    _check_timm_name(section.model)
    known = timm.get_pretrained_cfg(section.model)
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


def _transformers_host(
    section: HostSection, wanted: Mapping[str, Any], pretrained: bool, drop_path: float
) -> nn.Module:
    from transformers import AutoModelForImageClassification

    config = _transformers_config(section, pretrained)
    config.num_labels = wanted["num_classes"]
    vision = getattr(config, "vision_config", config)
    vision.num_channels = wanted["in_chans"]
    if wanted["image_size"] is not None:
        vision.image_size = wanted["image_size"]
    if drop_path:
        if not hasattr(vision, "drop_path_rate"):
            raise HostError(
                f"{type(config).__name__} has no stochastic depth, but drop_path={drop_path} was "
                "asked. Set train.drop_path to 0."
            )
        vision.drop_path_rate = drop_path
    if not pretrained:
        # None breaks the choice where a type has several classes (DeiT); empty means the first
        config.architectures = config.architectures or []
        host: nn.Module = AutoModelForImageClassification.from_config(config)
        return host
    host, report = AutoModelForImageClassification.from_pretrained(
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


def _transformers_config(section: HostSection, pretrained: bool) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if section.model in CONFIG_MAPPING and not pretrained:
        return AutoConfig.for_model(section.model, **section.kwargs)
    if section.model in CONFIG_MAPPING:
        raise UnsupportedHostError(
            f"{section.model!r} is a model type, which has no published weights. Name a "
            "checkpoint, such as 'google/vit-base-patch16-224', or start from random weights "
            "(pretrained=False, --scratch)."
        )
    try:
        return AutoConfig.from_pretrained(section.model, **section.kwargs)
    except (OSError, ValueError) as error:
        raise UnsupportedHostError(
            f"transformers finds neither a model type nor a checkpoint {section.model!r}. "
            f"{did_you_mean(section.model, CONFIG_MAPPING.keys())} ({error})"
        ) from error


def _transformers_settings(section: HostSection, pretrained: bool) -> dict[str, Any]:
    from transformers import AutoImageProcessor

    config = _transformers_config(section, pretrained)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or ANY_SIZE
    settings: dict[str, Any] = {
        "image_size": int(size if isinstance(size, int) else size[0]),
        "in_chans": int(getattr(vision, "num_channels", 3)),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    if pretrained:
        processor = AutoImageProcessor.from_pretrained(section.model)
        settings |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    return settings
