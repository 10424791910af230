"""Save a wrapped model to a folder, and load it again. Never pickle.

A folder holds `model.safetensors` (the host's weights), `predictors.safetensors` (what tokenprune
added, if anything), `recipe.yaml` (with the keep ratios in force), `tokenprune.json` (versions,
facts about the host, checksums), and `config.json` of timm or transformers, from which these build
the host. Folders of format 1 hold all weights in one file.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenprune.checkpoints.card import CARD_PICTURES, is_generated
from tokenprune.checkpoints.facts import (
    ADDED,
    CARD,
    CONFIG,
    FACTS,
    FORMAT,
    GENERATED,
    RECIPE,
    WEIGHTS,
    Facts,
    noted_library,
    read_facts,
    read_recipe,
    versions,
)
from tokenprune.checkpoints.fit import check_fit
from tokenprune.checkpoints.hub import fetched
from tokenprune.checkpoints.rebuild import like_saved, rebuilt, reloaded, write_config
from tokenprune.checkpoints.weights import (
    is_added,
    on_their_own,
    read_files,
    read_tensors,
    sha256,
    shared_names,
)
from tokenprune.checkpoints.wrapped import stated, wrap_options
from tokenprune.errors import CheckpointError
from tokenprune.files import all_or_nothing
from tokenprune.recipe import Recipe, RecipeSource, load_recipe
from tokenprune.runtime.fitted import have_learned
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.runtime.pruning import Pruning
from tokenprune.wrapping import wrap

__all__ = ["describe_weights", "load", "save", "saved_recipe", "write_folder"]

FOR_TORCH = {"format": "pt"}
"""transformers reads only files that say so."""


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    host: Mapping[str, Any] | None = None,
) -> Path:
    """Write a wrapped model to a directory.

    The files are written elsewhere and moved into place, so the directory holds a whole checkpoint
    or none. A checkpoint that is there already is replaced; other files in the directory stay.
    `model.save_pretrained(directory)` writes the same, a certificate and a model card.

    Args:
        model: What `wrap` returned.
        directory: Made if it does not exist, parents included.
        host: How to build a host that timm or transformers would build otherwise: the `host`
            section of a recipe, with `library`, `model` and the `kwargs` it was built with. None
            notes what its library says, or keeps the recipe's own.

    Returns:
        The directory.

    Raises:
        NotWrappedError: `model` is not wrapped.
        CheckpointError: Its state holds something that is no tensor, or the path is a file.
        RecipeError: `host` is no `host` section.

    Example:
        >>> tokenprune.save(model, "runs/deit")
        >>> model = tokenprune.load("runs/deit")
    """
    return write_folder(model, directory, host=host)


def write_folder(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    host: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    write_host: Callable[[Path], Any] | None = None,
    beside: Callable[[Path, Facts], Any] | None = None,
) -> Path:
    """`save`, with other writers.

    Args:
        model: What `wrap` returned.
        directory: Made if it does not exist.
        host: As for `save`.
        state: The weights, if not those of the model (a trainer has gathered them).
        write_host: Writes the weights of the host into a folder, in its library's way.
        beside: Writes more files, given the folder and the facts, after all others.
    """
    pruning, target = pruning_of(model), Path(directory)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Cannot save to {str(target)!r}: it is a file. Name a directory.")
    state = model.state_dict() if state is None else state
    aliases = shared_names(state)
    # the facts come last: until then their checksums do not fit the weights, and `load` says so
    replaced = [*GENERATED, *([CONFIG] if noted_library(target) else [])]
    if is_generated(target / CARD):
        replaced += [CARD, *CARD_PICTURES]
    with all_or_nothing(target, last=FACTS, replaces=replaced) as folder:
        if write_host is not None:
            write_host(folder)
        else:
            dense = {name: tensor for name, tensor in state.items() if not is_added(name)}
            save_file(on_their_own(dense, aliases), folder / WEIGHTS, metadata=FOR_TORCH)
        own = {name: tensor for name, tensor in state.items() if is_added(name)}
        if own and not _holds(folder, own):
            save_file(on_their_own(own, aliases), folder / ADDED, metadata=FOR_TORCH)
        describe_weights(pruning, folder, host=host, beside=beside, aliases=aliases)
    return target


def describe_weights(
    pruning: Pruning,
    folder: Path,
    *,
    host: Mapping[str, Any] | None = None,
    beside: Callable[[Path, Facts], Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write the recipe and the facts beside the weights that a folder holds, so that `load` reads
    them. `aliases` are the shared names of the wrapped model; without them, the host's.

    Raises:
        CheckpointError: There are none.
        RecipeError: `host` is no `host` section.
    """
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not [name for name in files if name != ADDED and not name.startswith("adapter_")]:
        raise CheckpointError(
            f"save_pretrained of {type(pruning.host).__name__} wrote {', '.join(files) or 'none'} "
            "instead of its weights (adapters alone, say). Write them by "
            "tokenprune.save(model, folder)."
        )
    recipe = _recipe_in_force(pruning)
    if host is not None:
        mapping = recipe.model_dump(mode="json", exclude_none=True)
        recipe = Recipe.parse({**mapping, "host": dict(host)}, where="save(host=...)")
    (folder / RECIPE).write_bytes(recipe.to_yaml().encode())
    library, why_not = write_config(pruning.host, folder)
    facts = Facts(
        format=FORMAT,
        versions=versions(),
        host={"library": library, "why_not": why_not, **_host_facts(pruning), **stated(pruning)},
        wrap={"adapter": pruning.spec.adapter, "restore": pruning.restore},
        aliases={**shared_names(pruning.host.state_dict()), **(aliases or {})},
        files={name: sha256(folder / name) for name in files},
        fitted=pruning.fitted or have_learned(pruning.added) is not False,
    )
    if beside is not None:
        beside(folder, facts)
    (folder / FACTS).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(
    directory: str | os.PathLike[str],
    host: nn.Module | None = None,
    *,
    recipe: RecipeSource | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Any:
    """Load a saved model, wrapped.

    Args:
        directory: What `save`, `save_pretrained` or a Trainer wrote; or the name of a repository on
            the Hugging Face Hub, such as `me/deit-pruned`.
        host: A host built as the saved one was; its weights do not matter, and if anything fails,
            it keeps them. None builds it: by timm or transformers from `config.json`, or as the
            `host` section of the recipe says. No code of the folder is run.
        recipe: Of a folder that holds none, which a Trainer wrote for a host that is not of
            transformers; with `host`.
        revision: Branch, tag or commit of a repository.
        token: For a private repository.
        options: Passed to `wrap`: `example_inputs`, `adapter`, `verify`, `train`.

    Returns:
        The wrapped model; in eval mode if its host was built here.

    Raises:
        CheckpointError: It is no such directory, a file is damaged or of a newer release, or it
            does not fit the host; lists what is missing, unexpected, or of another shape. Or the
            adapter finds other blocks or prefix tokens than it did when it was saved. Or a
            `revision` of a folder is asked for.
        MissingDependencyError: The host's library, or huggingface_hub, is not installed.
        AlreadyWrappedError: `host` is wrapped; unwrap it first.
    """
    source = fetched(directory, revision, token)
    facts = _facts_of(source) if recipe is not None else read_facts(source)
    chosen = read_recipe(source) if recipe is None else load_recipe(recipe)
    tensors = read_tensors(source, facts)
    if isinstance(host, PrunedModel):
        return wrap(host, chosen)  # raises
    state = {name: tensor for name, tensor in tensors.items() if not is_added(name)}
    if host is None:
        host = like_saved(rebuilt(source, facts, chosen), state)
    if any(tensor.is_meta for tensor in host.state_dict().values()):
        raise CheckpointError(
            "The host is on the meta device and has no memory to load into. Call "
            'host.to_empty(device="cpu") first.'
        )
    if state.keys() != host.state_dict().keys():
        state = reloaded(host, source) or state
    made = facts.host.get("class", "unknown")
    head = f"The checkpoint {str(source)!r} of a {made} does not fit"
    tail = (
        "Build the host as the saved one was built (same model, classes and image size)"
        f"{', or leave it out: tokenprune.load(folder)' if facts.host.get('library') else ''}."
    )
    check = partial(check_fit, source="checkpoint", tail=tail)
    check(state, host.state_dict(), head=f"{head} this {type(host).__name__}:")
    with _restored_on_error(host):
        host.load_state_dict(state)
        model = wrap(host, chosen, **{**wrap_options(facts), **options})
        _check_facts(pruning_of(model), facts, source)
        added = {name: tensor for name, tensor in tensors.items() if is_added(name)}
        own = {name: tensor for name, tensor in model.state_dict().items() if is_added(name)}
        check(added, own, head=f"{head} what its recipe adds to the host:")
        model.load_state_dict({**state, **added})
    pruning_of(model).fitted = facts.fitted
    return model


def saved_recipe(directory: str | os.PathLike[str]) -> Recipe:
    """The recipe of a checkpoint; its `host` section, if any, says which host to build.

    Raises:
        CheckpointError: It is no such directory, or the recipe is damaged.
    """
    read_facts(Path(directory))
    return read_recipe(Path(directory))


def _facts_of(source: Path) -> Facts:
    """What can be known of a folder that holds weights alone.

    Raises:
        CheckpointError: It holds none.
    """
    files = sorted(file.name for file in source.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{str(source)!r} holds no model.safetensors, which a Trainer writes. Name its newest "
            "folder, checkpoint-N."
        )
    sums = {name: sha256(source / name) for name in files}
    return Facts(format=FORMAT, versions={}, host={}, wrap={}, aliases={}, files=sums)


def _holds(folder: Path, own: Mapping[str, Tensor]) -> bool:
    """Whether the files of a folder hold what tokenprune added: a trainer's call writes all."""
    files = [file.name for file in folder.glob("*.safetensors")]
    return own.keys() <= read_files(folder, files).keys()


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


def _host_facts(pruning: Pruning) -> dict[str, Any]:
    kind = type(pruning.host)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "blocks": len(pruning.spec.blocks),
        "num_prefix_tokens": pruning.plan.num_prefix,
    }


def _check_facts(pruning: Pruning, facts: Facts, source: Path) -> None:
    """Raise CheckpointError if the host is understood otherwise than when it was saved."""
    now = _host_facts(pruning)
    for name in ("blocks", "num_prefix_tokens"):
        before = facts.host.get(name, now[name])  # older folders may lack it
        if before != now[name]:
            raise CheckpointError(
                f"The checkpoint {str(source)!r} was saved of a model with {name}={before}, but "
                f"{type(pruning.host).__name__} is taken by adapter {pruning.spec.adapter!r} to "
                f"have {name}={now[name]}, which gives other outputs. Pass the host and the "
                "adapter as they were when it was wrapped: tokenprune.load(folder, host, "
                "adapter=...)."
            )


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
