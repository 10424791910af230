"""`tokenprune export`: write a model to a file, check it, and time it against its dense export."""

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from tokenprune.cli.console import bar, show, working
from tokenprune.cli.hosts import build, host_of_folder, recipe_for
from tokenprune.cli.options import AdapterName, HostName, KeepRatio, Options, RecipeName
from tokenprune.cost.profile import profile
from tokenprune.cost.timing import Timing, interleaved
from tokenprune.errors import ExportError, HostError
from tokenprune.exporting import FORMATS, ExportReport, format_of, open_exported
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
            "`tokenprune train` or `tokenprune.save` wrote."
        ),
    ],
    recipe: RecipeName = "",
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"{' or '.join(FORMATS)}. Default: by file name.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option(help="The file. Default: the model's name in this folder.")
    ] = None,
    option: Options = None,
    host: HostName = "",
    adapter: AdapterName = "",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the published weights.")
    ] = False,
    host_weights: Annotated[
        Path | None, typer.Option(help="Start from these weights of the dense host.")
    ] = None,
    keep_ratio: KeepRatio = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per timed call.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=0, help="Timing rounds of half a second; 0: no timing.")
    ] = 7,
) -> None:
    """Write the eval path for any batch size, and compare the file with the model."""
    from tokenprune.cli.runs import load_host_weights, prune_by, reopen_model

    asked = format_of(output or "", format or None) if format or output else "onnx"
    by_name: dict[str, Any] = {"--recipe": recipe, "--adapter": adapter}
    by_name |= {"--pretrained": pretrained, "--host-weights": host_weights}
    by_name |= {} if host else {"--option": option}
    clash = next((name for name, value in by_name.items() if value), None)
    is_folder = Path(model).is_dir()
    if is_folder and clash is not None:
        raise HostError(
            f"{clash} is for building a model by name; {model!r} is a folder, and holds its own "
            "recipe and weights. Leave the option out."
        )
    if host and not is_folder:
        raise HostError(f"--host is for a folder, {model!r} is none. Leave it out.")
    with working(f"building {model}"):
        if is_folder:
            wrapped = reopen_model(Path(model), host_of_folder(host, option or ()))
        else:
            chosen = load_recipe(recipe) if recipe else None
            built = build(model, option or (), pretrained=pretrained)
            if host_weights is not None:
                load_host_weights(built, host_weights)
            spec = describe(built, adapter or None)
            wrapped = wrap(built, chosen or recipe_for(model, spec), adapter=spec, train=False)
        prune_by(wrapped, keep_ratio)
    target = output or Path(f"{Path(model.rpartition(':')[2]).name}.{asked}")
    with working(f"exporting to {asked}"):
        report = write(wrapped, target, asked)
    dense, timings = None, {}
    if rounds:
        with TemporaryDirectory() as folder:
            # where the dense host cannot be exported, the pruned file is compared with nothing
            with working("exporting the dense host"), suppress(ExportError), wrapped.using("dense"):
                dense = write(wrapped, Path(folder) / f"dense.{asked}", asked)
            timings = _time(wrapped, report, dense, batch_size, rounds)
    show(_table(model, report, dense, timings, profile(wrapped).ratio, batch_size))


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
