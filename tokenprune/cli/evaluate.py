"""`tokenprune eval`: accuracy and cost of a trained model."""

from typing import Annotated

import typer

from tokenprune.cli.console import bar, report, working
from tokenprune.cli.options import (
    Checkpoint,
    HostName,
    Images,
    Json,
    KeepRatio,
    Options,
    Threshold,
)
from tokenprune.errors import HostError
from tokenprune.rewrite.settings import PATHS

__all__ = ["evaluate"]


def evaluate(
    checkpoint: Checkpoint,
    data: Images = None,
    path: Annotated[
        list[str] | None, typer.Option(help="gather, mask or dense; may be repeated.")
    ] = None,
    keep_ratio: KeepRatio = "",
    threshold: Threshold = None,
    host: HostName = "",
    option: Options = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 256,
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint on held-out images."""
    from tokenprune.cli.runs import prune_by, reopen
    from tokenprune.cli.scores import scores

    chosen = [known for known in PATHS if known in (path or ("gather", "dense"))]
    unknown = sorted(set(path or ()) - set(PATHS))
    if unknown:
        raise HostError(f"There is no path {unknown[0]!r}. Choose among {', '.join(PATHS)}.")
    with working("loading"):
        run = reopen(checkpoint, data, host, option or ())
        prune_by(run.model, keep_ratio, threshold)
    with bar("evaluating", "images") as step:
        found, table = scores(run.model, run.data, chosen, batch_size, progress=step)
    report(as_json, found, table)
