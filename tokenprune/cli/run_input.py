"""`input.json` beside a trained model: which images it was trained on, and how they must look."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from tokenprune.errors import CheckpointError

if TYPE_CHECKING:
    from tokenprune.cli.runs import Run

__all__ = [
    "INPUT",
    "RunInput",
    "copy_input",
    "noted_settings",
    "read_input",
    "resolved",
    "write_input",
]

INPUT = "input.json"


class RunInput(BaseModel):
    """How images must look for a trained model; written into the folder of its checkpoint."""

    data: str | None
    settings: dict[str, Any]
    class_names: list[str]


def write_input(directory: Path, data: str | None, run: "Run") -> None:
    """Write into the folder of a checkpoint how its images were prepared, for `reopen`."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(run.data.class_names)
    noted = RunInput(data=resolved(data), settings=run.settings, class_names=names)
    (directory / INPUT).write_text(noted.model_dump_json(indent=2) + "\n", encoding="utf-8")


def copy_input(source: Path, target: Path) -> None:
    """Give a model that was made from a checkpoint that one's images."""
    if (source / INPUT).is_file() and source.resolve() != target.resolve():
        shutil.copyfile(source / INPUT, target / INPUT)


def noted_settings(directory: Path) -> dict[str, Any] | None:
    """How the images of a training run were prepared; None if the folder does not say so."""
    noted = read_input(directory)
    return None if noted is None else noted.settings


def read_input(directory: Path) -> RunInput | None:
    file = directory / INPUT
    if not file.exists():
        return None
    try:
        return RunInput.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {error}. Delete it to prepare images by the defaults of "
            "the recipe's host."
        ) from error


def resolved(data: str | None) -> str | None:
    """Absolute path of an image folder; None for scikit-learn's digits."""
    return None if data in (None, "digits") else str(Path(str(data)).resolve())
