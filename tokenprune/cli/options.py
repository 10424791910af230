"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AdapterName",
    "Checkpoint",
    "HostName",
    "Images",
    "KeepRatio",
    "ModelName",
    "Options",
    "RecipeName",
    "Threshold",
]

AdapterName = Annotated[str, typer.Option(help="Name of an adapter. Default: detected.")]
Checkpoint = Annotated[Path, typer.Argument(help="What `tokenprune train` wrote.")]
HostName = Annotated[
    str, typer.Option(help="The host of a folder whose recipe names none, or not all its options.")
]
Images = Annotated[
    str | None, typer.Option(help="Folder of images. Default: those of the training run.")
]
KeepRatio = Annotated[
    str, typer.Option(help="Prune by another ratio: 0.7, or one for each stage: 0.7,0.5.")
]
ModelName = Annotated[
    str,
    typer.Argument(
        help="timm name, timm:NAME, transformers:CLASS, :TYPE or :CHECKPOINT, without weights; "
        "or a folder that `tokenprune train` or `tokenprune.save` wrote."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="KEY=VALUE for building the model; may be repeated."),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Name or file. Default: one that fits.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Keep the tokens whose keep probability is above this.")
]
