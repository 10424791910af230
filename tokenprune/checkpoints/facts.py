"""The files of a saved model by name, and `tokenprune.json`, which says what they hold."""

import json
import platform
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tokenprune.errors import CheckpointError, RecipeError
from tokenprune.recipe import Recipe
from tokenprune.versions import DISTRIBUTION, version_of

__all__ = [
    "ADDED",
    "CARD",
    "CERTIFICATE",
    "CONFIG",
    "FACTS",
    "FORMAT",
    "GENERATED",
    "RECIPE",
    "WEIGHTS",
    "Facts",
    "damaged",
    "noted_library",
    "read_facts",
    "read_recipe",
    "versions",
]

FORMAT = 2
WEIGHTS = "model.safetensors"
"""The host's weights alone, since format 2: timm and transformers read this file."""
ADDED = "predictors.safetensors"
RECIPE, FACTS, CONFIG = "recipe.yaml", "tokenprune.json", "config.json"
CERTIFICATE, CARD = "certificate.json", "README.md"
GENERATED = [
    *(WEIGHTS, "model-?????-of-?????.safetensors", f"{WEIGHTS}.index.json", ADDED, CERTIFICATE)
]
"""Files of an earlier save that would say something else than those of a later one, as patterns."""


class Facts(BaseModel):
    """What `tokenprune.json` holds."""

    format: int  # of the folder; a larger number is from a newer release
    versions: dict[str, str]  # of Python and of the libraries that took part, for readers
    host: dict[str, Any]  # its class, the library that builds it, and sizes, for messages
    wrap: dict[str, Any]  # options that `wrap` got
    aliases: dict[str, str]  # name of a shared parameter -> the name it is stored under
    files: dict[str, str]  # files with weights -> their sha256
    fitted: bool = True  # the predictors were trained or calibrated; older releases do not say


def read_facts(source: Path) -> Facts:
    """The facts of a folder whose files are all there.

    Raises:
        CheckpointError: It is no such folder, lacks a file, or is damaged or of a newer release.
    """
    missing = [name for name in (FACTS, RECIPE) if not (source / name).is_file()]
    if missing:
        raise CheckpointError(_no_checkpoint(source, missing))
    try:
        read = json.loads((source / FACTS).read_text(encoding="utf-8"))
        if read.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"{str(source)!r} has format {read['format']} (written by tokenprune "
                f"{read.get('versions', {}).get('tokenprune', 'unknown')}); this release reads up "
                f"to {FORMAT}. Run: pip install --upgrade tokenprune-torch"
            )
        if read["format"] == 1:  # all weights in one file
            read["files"] = {WEIGHTS: read["sha256"]}
        facts = Facts.model_validate(read)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise damaged(source, FACTS, f"it cannot be read ({error})") from error
    missing = [name for name in facts.files if not (source / name).is_file()]
    if ADDED in missing:
        raise CheckpointError(
            f"{str(source)!r} lacks {ADDED}, the predictors of the model it was saved from; what "
            f"is left is the dense host. Fetch {ADDED} too, or wrap the host again: "
            "tokenprune.wrap(host, recipe)."
        )
    if missing:
        raise CheckpointError(_no_checkpoint(source, missing))
    return facts


def noted_library(source: Path) -> str:
    """The library that builds the host of a folder; empty if none is noted, or it is no such
    folder."""
    try:
        return str(read_facts(source).host.get("library", ""))
    except CheckpointError:
        return ""


def _no_checkpoint(source: Path, missing: list[str]) -> str:
    if not source.is_dir():
        how = f"is no checkpoint: it is no directory{' but a file' if source.is_file() else ''}."
        return f"{str(source)!r} {how} Name a directory that tokenprune.save wrote."
    lacks = f"{str(source)!r} is no checkpoint: it lacks {', '.join(missing)}."
    if FACTS not in missing or not list(source.glob("*.safetensors")):
        return f"{lacks} Name a directory that tokenprune.save wrote."
    return (
        f"{lacks} It holds weights that another library wrote. If they are of a wrapped model (a "
        "Trainer's checkpoint of a host that is not of transformers), name its recipe: "
        f"tokenprune.load({str(source)!r}, host, recipe=...). If they are of a dense host, load "
        "them into it by its own library, then tokenprune.wrap(host, recipe)."
    )


def damaged(source: Path, name: str, how: str) -> CheckpointError:
    """The error of a file that cannot be read or was changed."""
    return CheckpointError(
        f"{name} in {str(source)!r} is damaged: {how}. Save the model again or fetch another copy."
    )


def read_recipe(source: Path) -> Recipe:
    """The recipe in a folder.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return Recipe.load(source / RECIPE)
    except RecipeError as error:
        raise damaged(source, RECIPE, str(error)) from error


def versions() -> dict[str, str]:
    """Of Python, this library, torch, and the model libraries that are loaded."""
    packages = {"tokenprune": DISTRIBUTION, "torch": "torch"}
    packages |= {name: name for name in ("timm", "transformers") if name in sys.modules}
    found = {name: version_of(package) or "unknown" for name, package in packages.items()}
    return {"python": platform.python_version(), **found}
