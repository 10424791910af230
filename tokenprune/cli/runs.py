"""Shared by the commands that train or evaluate: build a recipe's host and data, reopen a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenprune.checkpoints.directory import load
from tokenprune.checkpoints.facts import read_facts, read_recipe
from tokenprune.checkpoints.rebuild import safe_section
from tokenprune.cli.console import warn
from tokenprune.cli.hosts import build, host_section, is_function
from tokenprune.cli.run_input import INPUT, read_input, resolved
from tokenprune.errors import CheckpointError, HostError, PlanError
from tokenprune.hosts.build import build_host, input_settings, model_library
from tokenprune.hosts.files import is_host_files
from tokenprune.hosts.registry import hints
from tokenprune.recipe import Recipe
from tokenprune.recipe.schema import HostSection
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.train import DataBundle, DataError, load_data
from tokenprune.train.data import HELD_OUT

__all__ = [
    "Run",
    "held_out_images",
    "host_of",
    "image_argument",
    "keep_ratios",
    "load_host_weights",
    "prepare",
    "prune_by",
    "read_images",
    "reopen",
    "reopen_model",
    "settings_of",
]

NO_IMAGES = (
    "{!r} does not say on which images it was trained (there is no {}, which `tokenprune train` "
    "writes). Give images with --data."
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A host, or the wrapped model of a checkpoint; images that fit it, and the `input_settings`
    they are prepared by. `host` is the `host` section with what was added to build it for them."""

    model: nn.Module
    data: DataBundle
    settings: dict[str, Any]
    host: dict[str, Any] | None = None


def host_of(recipe: Recipe, folder: Path | None = None) -> HostSection:
    """The recipe's `host` section; raises `PlanError` if it has none. `folder` is the checkpoint
    that holds the recipe, if one does."""
    if recipe.host is None and folder is not None:
        raise PlanError(
            f"The recipe in {str(folder)!r} names no host to build. Give it with --host, such as "
            "--host timm:deit_small_patch16_224, and an --option KEY=VALUE for each argument it "
            "was built with; or save it with tokenprune.save(model, folder, host=...)."
        )
    if recipe.host is None:
        named = f"Recipe {recipe.name!r}" if recipe.name else "The recipe"
        raise PlanError(
            f"{named} names no host to build. Give one with --model, such as "
            "--model deit_small_patch16_224, or add a `host` section."
        )
    return recipe.host


def prepare(
    recipe: Recipe, data: str | None, *, pretrained: bool, image_size: int | None = None
) -> Run:
    """Build a recipe's dense host, and read the images it is trained on: those of a folder, or
    scikit-learn's digits if `data` is None or "digits"."""
    section = host_of(recipe)
    torch.manual_seed(recipe.train.seed)
    settings = input_settings(section, image_size or recipe.train.image_size, pretrained)
    bundle = load_data(data, **settings, train=recipe.train, seed=recipe.train.seed)
    options = {"pretrained": pretrained, "drop_path": recipe.train.drop_path}
    host = _build(section, bundle.num_classes, settings, **options)
    described = _described(section, host, bundle.num_classes, settings)
    return Run(model=host, data=bundle, settings=settings, host=described)


def _described(
    section: HostSection, host: nn.Module, num_classes: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A section by which `load` builds the same host, where its library does not note it."""
    found = section.model_dump(mode="json")
    if section.library == "timm":  # transformers writes all of it into its configuration
        found["kwargs"] |= {"num_classes": num_classes, "in_chans": settings["in_chans"]}
        size = getattr(getattr(host, "patch_embed", None), "img_size", None)
        if size is not None:  # others take images of any size, and perhaps no such option
            found["kwargs"]["img_size"] = list(size) if isinstance(size, tuple) else size
    return found


def _build(
    section: HostSection, num_classes: int, settings: Mapping[str, Any], **options: Any
) -> nn.Module:
    """The host for images that are prepared by `settings`."""
    sizes = {name: settings[name] for name in ("image_size", "in_chans")}
    return build_host(section, num_classes, **sizes, **options)


def load_host_weights(host: nn.Module, file: Path) -> None:
    """Load a dense host's weights: safetensors, or a torch file that holds tensors only."""
    if not file.is_file():
        raise CheckpointError(f"There is no file {str(file)!r}. Name one with weights.")
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = state.get("model", state.get("state_dict", state))
        host.load_state_dict(state)
    except (SafetensorError, UnpicklingError, OSError, EOFError, AttributeError) as error:
        raise CheckpointError(
            f"Cannot read {str(file)!r}: {error}. Give a safetensors file, or one that torch.save "
            "wrote and that holds tensors only."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{str(file)!r} does not fit {type(host).__name__}: {error}\nBuild the host as the one "
            "of the file was built: give its arguments as KEY=VALUE."
        ) from error


def reopen(directory: Path, data: str | None, host: str = "", options: Sequence[str] = ()) -> Run:
    """The wrapped model of a checkpoint, and `held_out_images`. `host` and `options` say which host
    to build, if the folder does not."""
    if data is None and read_input(directory) is None:
        read_facts(directory)
        raise CheckpointError(NO_IMAGES.format(str(directory), INPUT))
    model = reopen_model(directory, host, options)
    bundle, settings = held_out_images(directory, model, data)
    return Run(model=model, data=bundle, settings=settings)


def held_out_images(
    directory: Path, model: nn.Module, data: str | None
) -> tuple[DataBundle, dict[str, Any]]:
    """Images prepared as in the training of a checkpoint, and how. They are those it was trained
    with if `data` is None. Of other images than those, all are evaluated on, unless they are in
    train/ and val/.

    Raises:
        CheckpointError: There is no training run, and `data` is None.
        DataError: They have other classes.
    """
    noted = read_input(directory)
    if noted is None and data is None:
        raise CheckpointError(NO_IMAGES.format(str(directory), INPUT))
    if noted is None:
        warn(f"{directory} lacks {INPUT}: images are prepared as for the host's published weights")
        settings, held_out = settings_of(model, True, directory), 1.0
    else:
        others = data is not None and resolved(data) != noted.data
        settings, data = noted.settings, data or noted.data
        held_out = 1.0 if others else HELD_OUT
    train = pruning_of(model).recipe.train
    bundle = load_data(data, **settings, held_out=held_out, train=train, seed=train.seed)
    if noted is not None and list(bundle.class_names) != noted.class_names:
        raise DataError(
            f"The model in {str(directory)!r} knows the classes {_short(noted.class_names)}, the "
            f"images of {bundle.name!r} have {_short(bundle.class_names)}. Give images of the same "
            "classes with --data."
        )
    return bundle, settings


def reopen_model(directory: Path, host: str = "", options: Sequence[str] = ()) -> Any:
    """The wrapped model of a checkpoint; no images are read.

    Args:
        directory: What `tokenprune train` or `tokenprune.save` wrote.
        host: Which host to build, as `cli.hosts` names it; what the folder says if empty.
        options: `KEY=VALUE` for building it.
    """
    if options and not host:
        raise HostError("--option is for building a host; name it with --host.")
    facts, recipe, noted = read_facts(directory), read_recipe(directory), read_input(directory)
    if not host and facts.host.get("library"):
        return load(directory)
    if host and (is_function(host) or is_host_files(Path(host))):
        return load(directory, build(host, options))
    own = None if host else safe_section(host_of(recipe, directory), directory)
    section = own or host_section(host, options)
    if noted is None:  # written by `tokenprune.save`: the host as it is described
        built = build_host(section)
    else:
        built = _build(section, len(noted.class_names), noted.settings)
    try:
        return load(directory, built)
    except CheckpointError as error:
        if host or "does not fit" not in str(error):
            raise
        raise CheckpointError(
            f"{error}\nIf that host was built with more arguments than its recipe says, which are "
            f"{section.kwargs}, give it with --host {section.library}:{section.model} and an "
            "--option KEY=VALUE for each, or save it with tokenprune.save(model, folder, host=...)."
        ) from error


def settings_of(model: nn.Module, published: bool, folder: Path | None = None) -> dict[str, Any]:
    """How images are prepared for a model that is there: the keyword arguments of `read_images`.

    Args:
        model: A host, or a wrapped model.
        published: Normalise as its weights were trained; otherwise to mean and deviation 0.5.
        folder: Where it was loaded from: transformers keeps a processor beside its weights.

    Raises:
        HostError: It takes no images.
    """
    host = pruning_of(model).host if isinstance(model, PrunedModel) else model
    channels, height, width = image_shape(model)
    half = (0.5,) * channels
    settings: dict[str, Any] = {
        "image_size": height if height == width else (height, width),
        "in_chans": channels,
        "mean": half,
        "std": half,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    known: Any = getattr(host, "pretrained_cfg", None)
    if known:
        from timm.data import resolve_data_config

        config = resolve_data_config(pretrained_cfg=dict(known), verbose=False)
        settings |= {key: config[key] for key in ("crop_pct", "interpolation")}
        if published and len(config["mean"]) == channels:
            settings |= {key: tuple(config[key]) for key in ("mean", "std")}
        return settings
    named = str(getattr(getattr(host, "config", None), "_name_or_path", ""))
    for place in (str(folder), named) if published else ():
        remote = place.count("/") == 1 and not Path(place).exists()
        if remote or (Path(place) / "preprocessor_config.json").is_file():
            processor = model_library("transformers", place).AutoImageProcessor
            found = processor.from_pretrained(place)
            settings |= {"mean": tuple(found.image_mean), "std": tuple(found.image_std)}
            break
    return settings


def image_argument(model: nn.Module) -> str | None:
    """Name of the argument that takes images; None if the adapter does not know the arguments.

    Raises:
        HostError: None of them takes images.
    """
    wrapped = isinstance(model, PrunedModel)
    host = pruning_of(model).host if wrapped else model
    inputs = (pruning_of(model).spec if wrapped else hints(host)).inputs
    for name, example in inputs.items():
        if len(example.shape) == 3 and example.high is None:
            return name
    if not inputs:
        return None
    found = ", ".join(f"{name} {list(example.shape)}" for name, example in inputs.items())
    raise HostError(
        f"Asked for what becomes of image patches, but {type(host).__name__} takes no images: its "
        f"inputs are {found}, without the batch. Run `tokenprune inspect`, which shows the "
        "token counts of any model as a table."
    )


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    name, wrapped = image_argument(model), isinstance(model, PrunedModel)
    if wrapped:
        tensors = pruning_of(model).example.tensors
        example = tensors[name] if name in tensors else next(iter(tensors.values()))
        shape = tuple(example.shape[1:])
    else:
        inputs = hints(model).inputs
        shape = tuple(inputs[name].shape) if name else ()
    if len(shape) != 3:
        raise HostError(
            f"{type(model).__name__} does not say which images it takes. Give its shape by an "
            "adapter (docs/adapters.md), or call tokenprune from Python with example_inputs."
        )
    return shape


def read_images(
    files: Sequence[Path],
    image_size: int | tuple[int, int],
    *,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
    interpolation: str,
) -> tuple[Tensor, Tensor]:
    """Image files as a host takes them, and the same as pixels in [0, 1]; [B, C, height, width]
    each. The middle of an image of another shape is cut out."""
    from timm.data import create_transform

    from tokenprune.train.images import ImageSet

    for file in files:
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise DataError(f"The image {str(file)!r} {what}. Give image files.")
    shared = {"crop_pct": crop_pct, "interpolation": interpolation}
    transform = create_transform(image_size, mean=tuple(mean), std=tuple(std), **shared)
    found = ImageSet(files, [0] * len(files), transform, in_chans=in_chans)
    images = torch.stack([found[number]["pixel_values"] for number in range(len(files))])
    by_channel = (torch.tensor(values).view(in_chans, 1, 1) for values in (std, mean))
    scale, shift = by_channel
    return images, (images * scale + shift).clamp(0, 1)


def prune_by(model: Any, keep_ratio: str, threshold: float | None = None) -> None:
    """Apply --keep-ratio, which replaces a threshold, or --threshold; without them ("" and None)
    the checkpoint's setting is kept."""
    if keep_ratio and threshold is not None:
        raise PlanError(
            "--keep-ratio keeps the same number of tokens of every image, --threshold the tokens "
            "above a keep probability. Give one of them."
        )
    if keep_ratio:
        model.set_threshold(None)
        model.set_keep_ratio(keep_ratios(keep_ratio))
    elif threshold is not None:
        model.set_threshold(threshold)


def keep_ratios(text: str) -> float | list[float]:
    """`"0.7"` as the base ratio of r, r^2, ...; `"0.7,0.5"` as one ratio for each stage."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"A keep ratio is a number, or one for each stage, found {text!r}. Give 0.7, or "
            "0.7,0.5,0.3."
        ) from None
    return ratios[0] if len(ratios) == 1 else ratios


def _short(names: Sequence[str]) -> str:
    return f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''} ({len(names)})"
