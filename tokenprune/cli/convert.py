"""`tokenprune convert`: turn a checkpoint of DynamicViT's authors into one of this library."""

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.checkpoints.dynamicvit import Converted, convert_dynamicvit
from tokenprune.cli.console import working
from tokenprune.cli.options import output
from tokenprune.errors import CheckpointError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="The authors' file (DeiT, LV-ViT or Swin).")],
    directory: Annotated[
        Path | None, typer.Argument(help="Where to write; tokenprune.load reads it. Or --output.")
    ] = None,
    folder: Annotated[Path | None, output("Where to write.")] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Base ratio rho. Default: the file's, else 0.7.")
    ] = None,
) -> None:
    """Turn a DynamicViT release file into a checkpoint of this library.

    The model is recognised by its parameter names and shapes. No code in the file is run.
    """
    target = folder or directory
    if target is None:
        raise CheckpointError(
            f"There is no folder to write to. Name one: tokenprune convert {source} FOLDER"
        )
    with working(f"converting {source}"):
        done = convert_dynamicvit(source, target, keep_ratio=keep_ratio)
    typer.echo(describe(done))


def describe(done: Converted) -> str:
    """What was found and written, and how to load it."""
    stages = ", ".join(f"{s.keep_ratio:g} at {s.block}" for s in done.recipe.resolved_stages)
    return (
        f"{done.host}: {len(done.weights)} tensors\n"
        f"recipe {done.recipe.name}, {done.recipe.mode}; keeps {stages}\n"
        f"written to {done.path}. Load it with:\n"
        f"  model = tokenprune.load({str(done.path)!r})"
    )
