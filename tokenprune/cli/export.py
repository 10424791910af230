"""`tokenprune export`: write a model to a file, check it, and time it against its dense export."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from tokenprune.cli.console import bar, show, working
from tokenprune.cli.hosts import build, recipe_for
from tokenprune.cost.profile import profile
from tokenprune.cost.timing import Timing, interleaved
from tokenprune.errors import ExportError, HostError
from tokenprune.exporting import FORMATS, ExportReport, Format, format_of, open_exported
from tokenprune.exporting import export as write
from tokenprune.hosts.inputs import draw_inputs
from tokenprune.hosts.registry import describe
from tokenprune.recipe import load_recipe
from tokenprune.report.table import Table
from tokenprune.runtime.model import pruning_of
from tokenprune.wrapping import wrap

__all__ = ["export"]


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="timm name, timm:NAME, transformers:CLASS, :TYPE or :CHECKPOINT; or a folder that "
            "`tokenprune train` wrote."
        ),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name or file. Default: one that fits.")
    ] = "",
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"{' or '.join(FORMATS)}. Default: by file name.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="The file. Default: the model's name in this folder.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="KEY=VALUE for building the model; may be repeated."),
    ] = None,
    adapter: Annotated[str, typer.Option(help="Name of an adapter. Default: detected.")] = "",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the published weights.")
    ] = False,
    host_weights: Annotated[
        Path | None, typer.Option(help="Start from these weights of the dense host.")
    ] = None,
    keep_ratio: Annotated[
        str, typer.Option(help="Prune by another ratio: 0.7, or one for each stage: 0.7,0.5.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per timed call.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=0, help="Timing rounds of half a second; 0: no timing.")
    ] = 7,
) -> None:
    """Write the eval path for any batch size, and compare the file with the model."""
    from tokenprune.cli.runs import prune_by

    asked = format_of(output or "", format or None) if format or output else "onnx"
    given: dict[str, Any] = {"--recipe": recipe, "--option": option, "--adapter": adapter}
    given |= {"--pretrained": pretrained, "--host-weights": host_weights}
    with working(f"building {model}"):
        if Path(model).is_dir():
            wrapped = _from_checkpoint(Path(model), given)
        else:
            wrapped = _from_name(model, recipe, option or [], adapter, pretrained, host_weights)
        prune_by(wrapped, keep_ratio)
    target = output or Path(f"{Path(model.rpartition(':')[2]).name}.{asked}")
    with working(f"exporting to {asked}"):
        report = write(wrapped, target, asked)
    ratio = profile(wrapped).ratio
    if not rounds:
        show(_table(model, report, None, {}, ratio, batch_size))
        return
    with TemporaryDirectory() as folder:
        with working("exporting the dense host"), wrapped.using("dense"):
            dense = _write_dense(wrapped, Path(folder) / f"dense.{asked}", asked)
        timings = _time(wrapped, report, dense, batch_size, rounds)
        show(_table(model, report, dense, timings, ratio, batch_size))


def _from_checkpoint(folder: Path, given: dict[str, Any]) -> Any:
    from tokenprune.cli.runs import reopen_model

    clash = next((name for name, value in given.items() if value), None)
    if clash is not None:
        raise HostError(
            f"{clash} is for building a model by name; {str(folder)!r} is a folder, and holds its "
            "own recipe and weights. Leave the option out."
        )
    return reopen_model(folder)


def _from_name(
    model: str,
    recipe: str,
    option: list[str],
    adapter: str,
    pretrained: bool,
    host_weights: Path | None,
) -> Any:
    from tokenprune.cli.runs import load_host_weights

    chosen = load_recipe(recipe) if recipe else None
    host = build(model, option, pretrained=pretrained)
    if host_weights is not None:
        load_host_weights(host, host_weights)
    spec = describe(host, adapter or None)
    return wrap(host, chosen or recipe_for(model, spec), adapter=spec)


def _write_dense(wrapped: Any, file: Path, format: Format) -> ExportReport | None:
    try:
        return write(wrapped, file, format)
    except ExportError:
        return None  # the pruned file is valid, and is not timed against a dense one


def _time(
    wrapped: Any, report: ExportReport, dense: ExportReport | None, batch_size: int, rounds: int
) -> dict[str, Timing]:
    host = pruning_of(wrapped)
    inputs = draw_inputs(host.spec, host.host, batch_size)
    device = next(iter(inputs.values())).device
    calls = {}
    for name, written in (("pruned", report), ("dense", dense)):
        if written is not None:
            run = open_exported(written.path, report.format, device)
            calls[name] = lambda run=run: run(inputs)
    with bar("timing", "rounds") as step:
        return interleaved(
            calls, rounds=rounds, device=device, after_round=lambda n: step(n + 1, rounds, {})
        )


def _table(
    model: str,
    report: ExportReport,
    dense: ExportReport | None,
    timings: dict[str, Timing],
    ratio: float,
    batch_size: int,
) -> Table:
    both = [found for found in (report, dense) if found is not None]
    rows = [
        ("size", *(f"{found.num_bytes / 1e6:.1f} MB" for found in both)),
        ("largest deviation from eager", *(f"{found.deviation:.1e}" for found in both)),
    ]
    notes = [
        f"Written to {report.path}, batch size open. Compared with the model at batch sizes "
        f"{' and '.join(map(str, report.checked))};",
        f"{report.tolerance:.0e} of the output's scale is allowed.",
    ]
    if timings:
        speed = (f"{timing.per_second(batch_size):.1f}" for timing in timings.values())
        rows.append((f"images/s at batch size {batch_size}", *speed))
        notes[-1] += (
            f" Timing: medians of {len(timings['pruned'].rounds)} interleaved rounds, "
            f"{torch.get_num_threads()} threads."
        )
    rows.append(("MACs, relative to dense", f"{ratio:.3f}", *("1" for _ in both[1:])))
    if dense is not None:
        faster = timings["dense"].seconds / timings["pruned"].seconds
        rows.append(("speed-up", f"{faster:.2f}x", "1x"))
        rows.append(("  bound by MACs", f"{1 / ratio:.2f}x", "1x"))
    elif timings:
        notes.append("The host cannot be exported without pruning, so nothing is compared.")
    columns = ("", "pruned", "dense")[: 1 + len(both)]
    return Table(f"{model} as {report.format}", columns, tuple(rows), "\n".join(notes))
