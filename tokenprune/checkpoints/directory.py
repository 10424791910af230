"""Save a wrapped model to a directory, and load it into a host again. Never pickle.

The directory holds three files: `model.safetensors` (the host's weights and what tokenprune added),
`recipe.yaml` (with the keep ratios in force) and `tokenprune.json` (versions, facts about the host,
and a checksum of the weights).
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenprune.checkpoints.fit import check_fit
from tokenprune.errors import CheckpointError, RecipeError
from tokenprune.files import all_or_nothing
from tokenprune.hosts.registry import list_adapters
from tokenprune.recipe import Recipe
from tokenprune.runtime.added import added_names
from tokenprune.runtime.fitted import have_learned
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.runtime.pruning import Pruning
from tokenprune.wrapping import wrap

__all__ = ["load", "save", "saved_recipe"]

FORMAT = 1
WEIGHTS, RECIPE, FACTS = "model.safetensors", "recipe.yaml", "tokenprune.json"


class Facts(BaseModel):
    """What `tokenprune.json` holds."""

    format: int  # of the directory; a larger number is from a newer release
    versions: dict[str, str]  # of Python and of the libraries that took part, for readers
    host: dict[str, Any]  # its class and what it was described as, for readers and messages
    wrap: dict[str, Any]  # options that `wrap` got
    aliases: dict[str, str]  # name of a shared parameter -> the name it is stored under
    sha256: str  # of the weights file
    fitted: bool = True  # the predictors were trained or calibrated; older releases do not say


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    host: Mapping[str, Any] | None = None,
) -> Path:
    """Write a wrapped model to a directory.

    The files are written elsewhere and moved into place, so the directory holds a whole checkpoint
    or none. A checkpoint that is there already is replaced; other files in the directory stay.

    Args:
        model: What `wrap` returned.
        directory: Made if it does not exist, parents included.
        host: How to build the host, for the command line: the `host` section of a recipe, with
            `library`, `model` and the `kwargs` it was built with. None keeps the recipe's own.

    Returns:
        The directory.

    Raises:
        NotWrappedError: `model` is not wrapped.
        CheckpointError: Its state holds something that is no tensor, or the path is a file.
        RecipeError: `host` is no `host` section.

    Example:
        >>> tokenprune.save(model, "runs/deit")
        >>> model = tokenprune.load("runs/deit", timm.create_model("deit_small_patch16_224"))
    """
    pruning, target = pruning_of(model), Path(directory)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Cannot save to {str(target)!r}: it is a file. Name a directory.")
    tensors, aliases = _one_name_each(model.state_dict())
    recipe = _recipe_in_force(pruning)
    if host is not None:
        mapping = recipe.model_dump(mode="json", exclude_none=True)
        recipe = Recipe.parse({**mapping, "host": dict(host)}, where="save(host=...)")
    # the facts come last: until then their checksum does not fit the weights, and `load` says so
    with all_or_nothing(target, last=FACTS) as folder:
        save_file(tensors, folder / WEIGHTS)
        (folder / RECIPE).write_bytes(recipe.to_yaml().encode())
        facts = Facts(
            format=FORMAT,
            versions=_versions(),
            host=_host_facts(pruning, tensors),
            wrap={"adapter": pruning.spec.adapter, "restore": pruning.restore},
            aliases=aliases,
            sha256=_sha256(folder / WEIGHTS),
            fitted=pruning.fitted or have_learned(pruning.added) is not False,
        )
        (folder / FACTS).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return target


def load(directory: str | os.PathLike[str], host: nn.Module, **options: Any) -> Any:
    """Load a saved model into a host of the same architecture, wrapped.

    The host gets the saved weights. If anything fails, it keeps its own.

    Args:
        directory: What `save` wrote.
        host: A fresh host, built as the saved one was; its weights do not matter.
        options: Passed to `wrap`: `example_inputs`, `adapter`, `verify`, `train`.

    Returns:
        The wrapped model.

    Raises:
        CheckpointError: It is no such directory, a file is damaged or of a newer release, or it
            does not fit the host; lists what is missing, unexpected, or of another shape.
        AlreadyWrappedError: `host` is wrapped; unwrap it first.
    """
    source = Path(directory)
    facts, recipe = _read_facts(source), _read_recipe(source)
    tensors = _read_tensors(source, facts)
    if isinstance(host, PrunedModel):
        return wrap(host, recipe)  # raises
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(added_names())}
    if any(tensor.is_meta for tensor in host.state_dict().values()):
        raise CheckpointError(
            "The host is on the meta device and has no memory to load into. Call "
            'host.to_empty(device="cpu") first.'
        )
    made = facts.host.get("class", "unknown")
    head = f"The checkpoint {str(source)!r} of a {made} does not fit"
    tail = "Build the host as the saved one was built (same model, classes and image size)."
    check = partial(check_fit, source="checkpoint", tail=tail)
    check(state, host.state_dict(), head=f"{head} this {type(host).__name__}:")
    with _restored_on_error(host):
        host.load_state_dict(state)
        model = wrap(host, recipe, **{**_wrap_options(facts), **options})
        added = {name: tensors[name] for name in tensors.keys() - state.keys()}
        own = {name: t for name, t in model.state_dict().items() if name.startswith(added_names())}
        check(added, own, head=f"{head} what its recipe adds to the host:")
        model.load_state_dict(tensors)
    pruning_of(model).fitted = facts.fitted
    return model


def saved_recipe(directory: str | os.PathLike[str]) -> Recipe:
    """The recipe of a checkpoint; its `host` section, if any, says which host to build.

    Raises:
        CheckpointError: It is no such directory, or the recipe is damaged.
    """
    _read_facts(Path(directory))
    return _read_recipe(Path(directory))


def _one_name_each(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under their first name, in memory of their own; other name -> first name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            found = "a tensor without data" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"Cannot save {name!r}: it is {found}. A checkpoint holds tensors only."
            )
        shared = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and first.setdefault(shared, name) != name:
            aliases[name] = first[shared]
            continue
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        value = value.detach().cpu().contiguous()
        tensors[name] = value if whole else value.clone()
    return tensors, aliases


def _recipe_in_force(pruning: Pruning) -> Recipe:
    """The recipe, with what `set_keep_ratio` and `set_threshold` have set."""
    recipe, ratios = pruning.recipe, pruning.budget.keep_ratios
    threshold = pruning.budget.threshold
    if threshold != (recipe.sampling.threshold if recipe.sampling.selection != "topk" else None):
        by_threshold = {"selection": "threshold", "threshold": threshold}
        chosen = {"selection": "topk"} if threshold is None else by_threshold
        recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update=chosen)})
    if tuple(stage.keep_ratio for stage in recipe.resolved_stages) == ratios:
        return recipe
    return recipe.with_stages(pruning.plan.blocks, ratios)


def _versions() -> dict[str, str]:
    packages = {"tokenprune": "tokenprune-torch", "torch": "torch"}
    packages |= {name: name for name in ("timm", "transformers") if name in sys.modules}
    found = {"python": platform.python_version()} | dict.fromkeys(packages, "unknown")
    for name, distribution in packages.items():
        with suppress(PackageNotFoundError):  # run from a source tree that was never installed
            found[name] = version(distribution)
    return found


def _host_facts(pruning: Pruning, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    kind = type(pruning.host)
    shapes = {n: list(t.shape) for n, t in tensors.items() if not n.startswith(added_names())}
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "blocks": len(pruning.spec.blocks),
        "num_prefix_tokens": pruning.plan.num_prefix,
        "tensors": len(shapes),
        "shapes_sha256": hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest(),
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_facts(source: Path) -> Facts:
    missing = [name for name in (FACTS, RECIPE, WEIGHTS) if not (source / name).is_file()]
    if missing == [FACTS, RECIPE] and _holds_predictors(source / WEIGHTS):
        raise CheckpointError(
            f"{str(source)!r} holds the weights of a wrapped model, but not its recipe: "
            "save_pretrained or a trainer wrote it. Write such a folder by tokenprune.save(model, "
            "folder). To load this one, make its host (from_pretrained reads it, where that wrote "
            "it), then model = tokenprune.wrap(host, recipe) with the recipe it had; "
            "model.load_state_dict(safetensors.torch.load_file("
            f"{str(source / WEIGHTS)!r}), strict=False)."
        )
    if missing:
        what = "is no directory" if not source.is_dir() else f"lacks {', '.join(missing)}"
        raise CheckpointError(
            f"{str(source)!r} is no checkpoint: it {what}. Name a directory that tokenprune.save "
            "wrote."
        )
    try:
        read = json.loads((source / FACTS).read_text(encoding="utf-8"))
        if read.get("format", 0) > FORMAT:
            raise CheckpointError(
                f"{str(source)!r} has format {read['format']} (written by tokenprune "
                f"{read.get('versions', {}).get('tokenprune', 'unknown')}); this release reads up "
                f"to {FORMAT}. Install a newer tokenprune-torch."
            )
        return Facts.model_validate(read)
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(source, FACTS, f"it cannot be read ({error})") from error


def _holds_predictors(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="pt") as file:
            return any(name.startswith(added_names()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _damaged(source: Path, name: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{name} in {str(source)!r} is damaged: {how}. Save the model again or fetch another copy."
    )


def _read_recipe(source: Path) -> Recipe:
    try:
        return Recipe.load(source / RECIPE)
    except RecipeError as error:
        raise _damaged(source, RECIPE, str(error)) from error


def _read_tensors(source: Path, facts: Facts) -> dict[str, Tensor]:
    try:
        with safe_open(source / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(source, WEIGHTS, f"it cannot be read ({error})") from error
    if _sha256(source / WEIGHTS) != facts.sha256:
        how = f"its checksum is not the one in {FACTS} (a broken copy, or a save that was cut off)"
        raise _damaged(source, WEIGHTS, how)
    shared = {a: tensors[name] for a, name in facts.aliases.items() if name in tensors}
    return {**tensors, **shared}


def _wrap_options(facts: Facts) -> dict[str, Any]:
    """How the saved model was wrapped; an adapter that is unknown here is not asked for."""
    known = facts.wrap.get("adapter") in list_adapters()
    return {name: value for name, value in facts.wrap.items() if known or name != "adapter"}


@contextmanager
def _restored_on_error(host: nn.Module) -> Iterator[None]:
    """Give the host its own weights back if the block fails."""
    before = {name: tensor.detach().clone() for name, tensor in host.state_dict().items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in host.state_dict().items():
                tensor.copy_(before[name])
        raise
