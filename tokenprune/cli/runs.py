"""Shared by the commands that train or evaluate: build a recipe's host and data, reopen a run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tokenprune.checkpoints.directory import load, saved_recipe
from tokenprune.cli.console import warn
from tokenprune.errors import CheckpointError, PlanError
from tokenprune.hosts.build import build_host, input_settings
from tokenprune.recipe import Recipe
from tokenprune.recipe.schema import HostSection
from tokenprune.train import DataBundle, DataError, load_data
from tokenprune.train.data import HELD_OUT

__all__ = [
    "Run",
    "host_of",
    "is_main_process",
    "keep_ratios",
    "load_host_weights",
    "prepare",
    "prune_by",
    "reopen",
    "reopen_model",
    "write_input",
]

INPUT = "input.json"


class _Input(BaseModel):
    """How images must look for a trained model; written into the folder of its checkpoint."""

    data: str | None
    settings: dict[str, Any]
    class_names: list[str]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A host, or a wrapped model, and images that fit it.

    Attributes:
        model: The host before training, the wrapped model of a checkpoint.
        data: Images to train and to evaluate on.
        settings: How they are prepared: what `input_settings` returned.
    """

    model: nn.Module
    data: DataBundle
    settings: dict[str, Any]


def is_main_process() -> bool:
    """Whether this process is rank 0, which alone writes and prints under `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def host_of(recipe: Recipe) -> HostSection:
    """The recipe's `host` section.

    Raises:
        PlanError: It has none.
    """
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
    """Build a recipe's dense host and read the images it is trained on.

    Args:
        recipe: Has a `host` section.
        data: Folder of images; None or "digits" for scikit-learn's digits.
        pretrained: Start from the published weights.
        image_size: Instead of the recipe's.

    Raises:
        PlanError: The recipe names no host.
        HostError: The host cannot be built.
        DataError: The images cannot be read.
    """
    section = host_of(recipe)
    torch.manual_seed(recipe.train.seed)
    settings = input_settings(section, image_size or recipe.train.image_size, pretrained)
    bundle = load_data(data, **settings, train=recipe.train, seed=recipe.train.seed)
    host = build_host(
        section,
        bundle.num_classes,
        image_size=settings["image_size"],
        pretrained=pretrained,
        in_chans=settings["in_chans"],
        drop_path=recipe.train.drop_path,
    )
    return Run(model=host, data=bundle, settings=settings)


def load_host_weights(host: nn.Module, file: Path) -> None:
    """Load a dense host's weights: safetensors, or a torch file that holds tensors only.

    Raises:
        CheckpointError: The file cannot be read, or does not fit the host.
    """
    if not file.is_file():
        raise CheckpointError(f"There is no file {str(file)!r} with weights of the host.")
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
            f"{str(file)!r} does not fit {type(host).__name__}: {error}"
        ) from error


def write_input(directory: Path, data: str | None, run: Run) -> None:
    """Write into the folder of a checkpoint how its images were prepared, for `reopen`."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(run.data.class_names)
    noted = _Input(data=_resolved(data), settings=run.settings, class_names=names)
    (directory / INPUT).write_text(noted.model_dump_json(indent=2) + "\n", encoding="utf-8")


def reopen(directory: Path, data: str | None) -> Run:
    """The wrapped model of a checkpoint, and images prepared as in its training.

    Args:
        directory: What `tokenprune train` or `tokenprune.save` wrote.
        data: Folder of images; those it was trained with if None. Of other images than those, all
            are evaluated on, unless they are in train/ and val/.

    Raises:
        CheckpointError: It is no checkpoint, does not fit the host that its recipe names, or does
            not say on which images it was trained and `data` is None.
        DataError: The images cannot be read, or have other classes.
    """
    recipe = saved_recipe(directory)
    section = host_of(recipe)
    noted = _read_input(directory)
    if noted is None:
        if data is None:
            raise CheckpointError(
                f"{str(directory)!r} does not say on which images it was trained (there is no "
                f"{INPUT}, which `tokenprune train` writes). Give images with --data."
            )
        warn(f"{directory} lacks {INPUT}: images are prepared as for the host's published weights")
        settings = input_settings(section, recipe.train.image_size, pretrained=True)
        held_out = 1.0
    else:
        others = data is not None and _resolved(data) != noted.data
        settings, data = noted.settings, data or noted.data
        held_out = 1.0 if others else HELD_OUT
    options: dict[str, Any] = {**settings, "held_out": held_out}
    bundle = load_data(data, **options, train=recipe.train, seed=recipe.train.seed)
    if noted is not None and list(bundle.class_names) != noted.class_names:
        raise DataError(
            f"The model in {str(directory)!r} knows the classes {_short(noted.class_names)}, the "
            f"images of {bundle.name!r} have {_short(bundle.class_names)}. Give images of the same "
            "classes with --data."
        )
    host = build_host(
        section,
        bundle.num_classes,
        image_size=settings["image_size"],
        in_chans=settings["in_chans"],
    )
    return Run(model=load(directory, host), data=bundle, settings=settings)


def reopen_model(directory: Path) -> Any:
    """The wrapped model of a checkpoint; no images are read.

    Raises:
        CheckpointError: It is no checkpoint, or does not fit the host that its recipe names.
    """
    section, noted = host_of(saved_recipe(directory)), _read_input(directory)
    if noted is None:  # written by `tokenprune.save`: the host as the recipe describes it
        return load(directory, build_host(section))
    host = build_host(
        section,
        len(noted.class_names),
        image_size=noted.settings["image_size"],
        in_chans=noted.settings["in_chans"],
    )
    return load(directory, host)


def prune_by(model: Any, keep_ratio: str, threshold: float | None = None) -> None:
    """Apply --keep-ratio or --threshold; without them the checkpoint's setting is kept.

    Args:
        model: What `wrap` returned.
        keep_ratio: As for `keep_ratios`; "" if not given. Replaces a threshold.
        threshold: As for `set_threshold`; None if not given.

    Raises:
        PlanError: Both are given, or one is out of range.
    """
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
    """`"0.7"` as the base ratio of r, r^2, ...; `"0.7,0.5"` as one ratio for each stage.

    Raises:
        PlanError: It is neither.
    """
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"A keep ratio is a number such as 0.7, or one for each stage such as 0.7,0.5,0.3; "
            f"found {text!r}."
        ) from None
    return ratios[0] if len(ratios) == 1 else ratios


def _resolved(data: str | None) -> str | None:
    """Absolute path of an image folder; None for scikit-learn's digits."""
    return None if data in (None, "digits") else str(Path(str(data)).resolve())


def _read_input(directory: Path) -> _Input | None:
    file = directory / INPUT
    if not file.exists():
        return None
    try:
        return _Input.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {error}. Delete it to prepare images by the defaults of "
            "the recipe's host."
        ) from error


def _short(names: Sequence[str]) -> str:
    return f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''} ({len(names)})"
