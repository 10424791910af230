"""Open the model that a command line names: the one way in of all commands that take a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.checkpoints.facts import CONFIG, FACTS
from tokenprune.cli.console import working
from tokenprune.cli.hosts import build, is_function, recipe_for
from tokenprune.errors import HostError
from tokenprune.hosts.registry import hints
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import load_recipe
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.wrapping import wrap

__all__ = ["Opened", "open_model"]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model, and where it came from.

    Attributes:
        name: As it was given.
        model: In eval mode; wrapped, unless it was built and only asked for as it is.
        folder: Of a saved model; None if it was built.
        published: It has weights that were trained, on images that were normalised for them.
    """

    name: str
    model: Any
    folder: Path | None
    published: bool

    def image_settings(self) -> dict[str, Any]:
        """How images are prepared for it: the keyword arguments of `read_images`, `load_data`."""
        from tokenprune.cli.run_input import noted_settings
        from tokenprune.cli.runs import settings_of

        noted = None if self.folder is None else noted_settings(self.folder)
        return noted or settings_of(self.model, self.published, self.folder)


def open_model(
    name: str,
    options: Sequence[str] = (),
    *,
    recipe: str = "",
    otherwise: str = "",
    adapter: str = "",
    host: str = "",
    pretrained: bool = False,
    host_weights: Path | None = None,
    wrapped: bool = True,
    verify: bool = False,
    seen: Callable[[nn.Module, ArchSpec], None] = lambda host, spec: None,
) -> Opened:
    """Load a saved model, or build a host and wrap it.

    Args:
        name: A folder that `tokenprune train` or `save` wrote; or a host, as `cli.hosts` says.
        options: `KEY=VALUE` for building the host.
        recipe: Of a host that is built.
        otherwise: Where no recipe is given; by default the shipped recipe of its name, if any.
        adapter: Of a host that is built; by default the one that knows its class.
        host: What a folder's host is, if the folder does not say so.
        pretrained: Load published weights into a host that is built.
        host_weights: File with weights of a host that is built.
        wrapped: Wrap a host that is built.
        verify: Prove it.
        seen: Called with the host and what is known of it, whether it can be wrapped or not.

    Raises:
        HostError: An option does not go with what the name is.
    """
    from tokenprune.cli.runs import load_host_weights, reopen_model

    folder = Path(name)
    of_host = {"--recipe": recipe, "--adapter": adapter, "--pretrained": pretrained}
    of_host |= {"--host-weights": host_weights}
    if folder.is_dir() and ((folder / FACTS).exists() or not (folder / CONFIG).exists()):
        clash = next((option for option, value in of_host.items() if value), None)
        if clash is not None:
            raise HostError(
                f"{clash} is for building a model by name; {name!r} is a folder, and holds its own "
                "recipe and weights. Leave the option out."
            )
        with working(f"loading {folder}"):
            model = reopen_model(folder, host, options)
        seen(pruning_of(model).host, pruning_of(model).spec)
        return Opened(name=name, model=model.eval(), folder=folder, published=True)
    if host:
        raise HostError(f"--host is for a folder, {name!r} is none. Leave --host out.")
    with working(f"building {name}"):
        built = build(name, options, pretrained=pretrained)
        if host_weights is not None:
            load_host_weights(built, host_weights)
    published = pretrained or folder.is_dir() or is_function(name)
    if isinstance(built, PrunedModel):  # a function may return one
        clash = "--recipe" if recipe else "--adapter" if adapter else None
        if clash is not None:
            raise HostError(f"{name} returns a wrapped model, which has both. Leave {clash} out.")
        seen(pruning_of(built).host, pruning_of(built).spec)
    elif wrapped:
        spec, dense = hints(built, adapter or None), built
        try:
            with working("tracing and proving" if verify else "tracing"):
                given = recipe or otherwise
                chosen = load_recipe(given) if given else recipe_for(name, spec)
                built = wrap(built, chosen, adapter=adapter or None, verify=verify, train=False)
            spec = pruning_of(built).spec  # what the graph has shown too
        finally:
            seen(dense, spec)
    return Opened(name=name, model=built, folder=None, published=published)
