"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AdapterName",
    "Checkpoint",
    "HostName",
    "HostWeights",
    "Images",
    "Json",
    "KeepRatio",
    "ModelName",
    "Options",
    "Pretrained",
    "RecipeName",
    "Settings",
    "Threshold",
    "output",
]

AdapterName = Annotated[str, typer.Option(help="Name of an adapter. Default: detected.")]
Checkpoint = Annotated[Path, typer.Argument(help="What `tokenprune train` or `save` wrote.")]
HostName = Annotated[
    str, typer.Option(help="The host of a folder whose recipe names none, or not all its options.")
]
HostWeights = Annotated[
    Path | None, typer.Option(help="Build a model with these weights of the dense host.")
]
Images = Annotated[
    str | None, typer.Option(help="Folder of images. Default: those of the training run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")]
KeepRatio = Annotated[
    str, typer.Option(help="Prune by another ratio: 0.7, or one for each stage: 0.7,0.5.")
]
ModelName = Annotated[
    str,
    typer.Argument(
        help="A saved folder; a timm name; transformers:CLASS, :TYPE or :CHECKPOINT; a folder or "
        "config.json of either library; or module:function, of your own code."
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="KEY=VALUE for building the model; may be repeated."),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Build a model with the published weights.")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Name or file. Default: one that fits.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For building the model, such as img_size=64."),
]
Threshold = Annotated[
    float | None, typer.Option(help="Keep the tokens whose keep probability is above this.")
]


def output(text: str) -> typer.models.OptionInfo:
    """The option by which every command names what it writes."""
    found: typer.models.OptionInfo = typer.Option("--output", "-o", help=text)
    return found
