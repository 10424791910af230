"""How to build a host again: noted beside its weights in the format of its own library.

timm and transformers both keep this in `config.json`, and both build a model from a folder that has
one. So a folder with the host's weights is also a folder of that library.
"""

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.checkpoints.facts import CONFIG, Facts
from tokenprune.errors import CheckpointError, TokenPruneError
from tokenprune.hosts.build import build_host, model_library, names_files
from tokenprune.recipe import Recipe
from tokenprune.recipe.schema import HostSection

__all__ = ["library_of", "like_saved", "rebuilt", "reloaded", "safe_section", "write_config"]

NO_MATHS = {
    *("training", "grad_checkpointing", "gradient_checkpointing", "fused_attn"),
    "name_or_path",
}
"""Attributes that say how, not what, a host computes, and where it came from."""


def library_of(host: nn.Module) -> str:
    """`timm` or `transformers` if a class of that library made the host, else nothing."""
    timm = sys.modules.get("timm")
    made = (getattr(host, "pretrained_cfg", None) or {}).get("architecture")
    if timm is not None and made and timm.is_model(made):
        return "timm"
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(host, transformers.PreTrainedModel):
        return ""
    return "transformers" if type(host).__module__.startswith("transformers.") else ""


def write_config(host: nn.Module, folder: Path) -> tuple[str, str]:
    """Write `config.json` of the host's library, unless it is there, and build a host of it on the
    meta device, to see that it is this one.

    Returns:
        The library, and nothing. Or nothing and the reason, where there is no library or it would
        build another host (one whose layers were replaced); then no file is written either.
    """
    library, file = library_of(host), folder / CONFIG
    if not library:
        return "", "no class of timm or transformers made it"
    there = file.exists()
    try:
        if library == "timm":
            _write_timm(host, file)
        elif not there:
            _write_transformers(host, folder)
        again = _sketch(library, type(host), folder)
        differs = _difference(host, again)
        if not differs:
            return library, ""
        why = f"a layer was replaced or set otherwise ({differs})"
        if library == "timm" and not hasattr(host, "_model_args"):
            why += ", or it was built with arguments, which this older timm does not note"
        why_not = f"{library} builds another model by its configuration: {why}"
    except Exception as error:  # whatever a library says to a configuration that it cannot take
        why_not = f"{library} cannot note how it was built: {type(error).__name__}: {error}"
    if not there:
        file.unlink(missing_ok=True)
    return "", why_not


def _write_timm(host: nn.Module, file: Path) -> None:
    from timm.models._hub import save_config_for_hf

    known: dict[str, Any] = {}
    if not hasattr(host, "_model_args"):  # an older timm does not note what a model was made with
        size = getattr(getattr(host, "patch_embed", None), "img_size", None)
        known = {"num_classes": host.num_classes} | ({"img_size": size} if size else {})
    else:  # timm leaves these out, which training needs
        made: Any = host._model_args
        known = {name: rate for name, rate in made.items() if name.endswith("_rate")}
    save_config_for_hf(host, file, model_args=known)


def _write_transformers(host: Any, folder: Path) -> None:
    config = copy.deepcopy(host.config)  # the host's own stays as it is
    config.architectures, config.dtype = [type(host).__name__], str(host.dtype).partition(".")[2]
    config.save_pretrained(folder)


def _difference(host: nn.Module, again: nn.Module) -> str:
    """What the host has otherwise than one that was built again; empty if nothing."""
    before, after = _settings(host), _settings(again)
    return next((name for name in before | after if before.get(name) != after.get(name)), "")


def _settings(host: nn.Module) -> dict[str, Any]:
    """What a host computes with: its tensors' shapes, its modules, and their plain attributes.

    As `repr`, so that a NaN equals itself and 1 is not True.
    """
    found: dict[str, Any] = {name: tensor.shape for name, tensor in host.state_dict().items()}
    for path, module in host.named_modules():
        found[path or "the model"] = type(module), module.extra_repr()
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str)
            if plain and not name.startswith("_") and name not in NO_MATHS:
                found[f"{path}.{name}".lstrip(".")] = repr(value)
    return found


def _sketch(library: str, kind: Any, folder: Path) -> nn.Module:
    """A host of the same kind without weights; on the meta device, if its code can be run there."""
    with _quiet(library):
        try:
            with torch.device("meta"):
                return _built(library, kind, folder)
        except Exception:  # its code reads a number from a tensor, say
            with torch.random.fork_rng():
                return _built(library, kind, folder)


def _built(library: str, kind: Any, folder: Path) -> nn.Module:
    if library == "timm":
        import tokenprune.models  # noqa: F401  registers lvvit_* with timm

        timm = model_library("timm", str(folder))
        return timm.create_model(f"local-dir:{folder}", pretrained=False)  # type: ignore[no-any-return]
    config = kind.config_class.from_pretrained(folder)
    return kind(config)  # type: ignore[no-any-return]


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Without what a library says about a model that is built to be looked at."""
    log = logging.getLogger(library)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def rebuilt(source: Path, facts: Facts, recipe: Recipe) -> nn.Module:
    """A host like the saved one, in eval mode; its weights are still to be loaded.

    Raises:
        CheckpointError: Neither the folder nor the recipe says how to build it, or the recipe
            names files of somewhere else.
        MissingDependencyError: Its library is not installed.
    """
    library, made = str(facts.host.get("library", "")), str(facts.host.get("class", "unknown"))
    if not library and recipe.host is not None:
        return build_host(safe_section(recipe.host, source))
    if not library:
        raise CheckpointError(
            f"{str(source)!r} does not say how to build its host, a {made} "
            f"({facts.host.get('why_not', 'an older release saved it')}). Build it as it was when "
            f"it was saved, and pass it: tokenprune.load({str(source)!r}, host)."
        )
    module = model_library(library, made)
    try:
        kind: Any = None if library == "timm" else _class_named(module, made)
        return _built(library, kind, source).eval()
    except TokenPruneError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{library} {module.__version__} cannot build the {made} of {str(source)!r}: "
            f"{type(error).__name__}: {error}. It was saved with {library} "
            f"{facts.versions.get(library, 'unknown')}. Install that version, or pass the host: "
            f"tokenprune.load({str(source)!r}, host)."
        ) from error


def safe_section(section: HostSection, source: Path) -> HostSection:
    """The `host` section of a folder, which somebody else may have written: nothing is read or
    downloaded for it.

    Raises:
        CheckpointError: It names a path or a repository.
    """
    if names_files(section):
        raise CheckpointError(
            f"The recipe in {str(source)!r} has its host from {section.model!r}, which is a path "
            f"or a repository and no name that {section.library} knows; a folder does not decide "
            "what is read or downloaded. If you trust it, build that host and pass it: "
            f"tokenprune.load({str(source)!r}, host), or --host on the command line."
        )
    return section


def _class_named(library: Any, path: str) -> Any:
    """A class of transformers by its path. No other module is imported: the path is of a file that
    somebody else may have written."""
    module, _, name = path.rpartition(".")
    if not module.startswith("transformers.models."):
        raise CheckpointError(
            f"The host is noted as {path!r}, which is no model of transformers. Build it and pass "
            "it: tokenprune.load(folder, host)."
        )
    found = getattr(library, name, None)
    return found if found is not None else getattr(import_module(module), name)


def like_saved(host: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The host with parameters and buffers of the saved data types."""
    with torch.no_grad():
        for name, tensor in host.state_dict(keep_vars=True).items():
            saved = state.get(name)
            if saved is not None and tensor.dtype != saved.dtype:
                tensor.data = tensor.data.to(saved.dtype)
    return host


def reloaded(host: nn.Module, source: Path) -> dict[str, Tensor] | None:
    """The weights of a folder under the names that the host has, where transformers wrote them
    under others; None if it did not."""
    if library_of(host) != "transformers" or not (source / CONFIG).is_file():
        return None
    with _quiet("transformers"):
        again, report = type(host).from_pretrained(source, output_loading_info=True)  # type: ignore[attr-defined]
    if report["missing_keys"] or report["mismatched_keys"]:
        return None
    state: dict[str, Tensor] = again.state_dict()
    return state
