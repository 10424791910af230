"""`tokenprune convert`: turn a checkpoint of DynamicViT's authors into one of this library."""

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.checkpoints.dynamicvit import Converted, convert_dynamicvit

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="The authors' file (DeiT, LV-ViT or Swin).")],
    directory: Annotated[Path, typer.Argument(help="Where to write; tokenprune.load reads it.")],
    keep_ratio: Annotated[
        float | None, typer.Option(help="Base ratio rho. Default: the file's, else 0.7.")
    ] = None,
) -> None:
    """Turn a DynamicViT release file into a checkpoint of this library.

    The model is recognised by its parameter names and shapes. No code in the file is run.
    """
    typer.echo(describe(convert_dynamicvit(source, directory, keep_ratio=keep_ratio)))


def describe(done: Converted) -> str:
    """What was found and written, and how to load it."""
    stages = ", ".join(f"{s.keep_ratio:g} at {s.block}" for s in done.recipe.resolved_stages)
    host = done.recipe.host
    name, kwargs = (host.model, host.kwargs) if host else (done.host, {})
    options = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    own = "import tokenprune.models  # registers it with timm\n  " if "lvvit" in done.host else ""
    return (
        f"{done.host}: {len(done.weights)} tensors\n"
        f"recipe {done.recipe.name}, {done.recipe.mode}; keeps {stages}\n"
        f"written to {done.path}. Load it with:\n"
        f"  {own}host = timm.create_model({name!r}{options})\n"
        f"  model = tokenprune.load({str(done.path)!r}, host)"
    )
