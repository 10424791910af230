"""Dense hosts from files of their own library: a folder of timm or transformers, or a
configuration of transformers alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.errors import HostError, TokenPruneError
from tokenprune.hosts.build import model_library

__all__ = ["host_of_files", "is_host_files"]

CONFIG = "config.json"


def is_host_files(path: Path) -> bool:
    """Whether a path is a folder with a `config.json`, or such a file by itself."""
    return (path / CONFIG).is_file() or (path.suffix == ".json" and path.is_file())


def host_of_files(path: Path, options: Mapping[str, Any]) -> nn.Module:
    """Build a dense host, in eval mode: with the weights of a folder, or with random ones by a
    configuration alone.

    Args:
        path: A folder that timm or transformers wrote, or `config.json` of transformers.
        options: For timm's `create_model`, or keys of the configuration.

    Raises:
        MissingDependencyError: The library is not installed.
        HostError: It is no configuration of these two, or the library cannot build it.
    """
    file = path / CONFIG if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        timm = "architecture" in config
        known = timm or "model_type" in config
    except (ValueError, TypeError) as error:
        raise HostError(f"{str(file)!r} is no configuration: {error}. Fetch it again.") from error
    if not known:
        raise HostError(
            f"{str(file)!r} has neither `architecture`, as a configuration of timm has, nor "
            "`model_type`, as one of transformers. Name a folder that one of them wrote."
        )
    library = model_library("timm" if timm else "transformers", str(path))
    try:
        if timm:
            import tokenprune.models  # noqa: F401  registers lvvit_* with timm

            made = library.create_model(f"local-dir:{file.parent}", path.is_dir(), **options)
            return made.eval()  # type: ignore[no-any-return]
        return _transformers(library, path, config, options).eval()  # type: ignore[no-any-return]
    except TokenPruneError:
        raise
    except Exception as error:  # a library may refuse a folder in any way
        raise HostError(
            f"{library.__name__} cannot build the model of {str(path)!r} with the options "
            f"{dict(options)}: {type(error).__name__}: {error}. Change the options, or fetch the "
            "folder again."
        ) from error


def _transformers(library: Any, path: Path, config: Any, options: Mapping[str, Any]) -> Any:
    names = config.get("architectures") or ["AutoModelForImageClassification"]
    kind = getattr(library, names[0], None)
    if kind is None:
        raise HostError(
            f"{str(path)!r} is of the class {names[0]!r}, which transformers {library.__version__} "
            "does not have. Write a function that returns the host, and name it as module:function."
        )
    if path.is_dir():
        return kind.from_pretrained(path, **options)
    known = library.AutoConfig.from_pretrained(path, **options)
    return kind.from_config(known) if "Auto" in names[0] else kind(known)
