"""Open the folder, or build and wrap the model, that a command line names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.cli.console import working
from tokenprune.cli.hosts import build, host_of_folder, recipe_for
from tokenprune.errors import HostError
from tokenprune.hosts.registry import describe
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import load_recipe
from tokenprune.runtime.model import pruning_of
from tokenprune.wrapping import wrap

__all__ = ["wrapped_model"]


def wrapped_model(
    name: str,
    *,
    recipe: str = "",
    adapter: str = "",
    host: str = "",
    options: Sequence[str] = (),
    seen: Callable[[nn.Module, ArchSpec], None] = lambda host, spec: None,
) -> Any:
    """The model of a folder that `tokenprune train` or `save` wrote; or a host, built without
    weights and wrapped by a recipe.

    Args:
        name: The folder, or a name as `build` takes it.
        recipe: Of a host that is built; by default the shipped recipe of its name, if any.
        adapter: Of a host that is built; by default the one that knows its class.
        host: What a folder's host is, if the folder does not say so.
        options: `KEY=VALUE` for building the host.
        seen: Called with the host and what is known of it, before it is wrapped.

    Raises:
        HostError: An option does not go with what the name is.
    """
    folder = Path(name)
    if folder.is_dir():
        clash = "--recipe" if recipe else "--adapter" if adapter else None
        if clash is not None:
            raise HostError(
                f"{clash} is for building a model by name; {name!r} is a folder, and holds its own "
                "recipe. Leave the option out."
            )
        from tokenprune.cli.runs import reopen_model

        with working(f"loading {folder}"):
            model = reopen_model(folder, host_of_folder(host, options))
        seen(pruning_of(model).host, pruning_of(model).spec)
        return model
    if host:
        raise HostError(f"--host is for a folder, {name!r} is none. Leave it out.")
    chosen = load_recipe(recipe) if recipe else None
    with working(f"building {name}"):
        built = build(name, options)
    spec = describe(built, adapter or None)
    seen(built, spec)
    with working("tracing"):
        chosen = chosen or recipe_for(name, spec)
        return wrap(built, chosen, adapter=spec, verify=False, train=False)
