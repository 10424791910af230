"""`tokenprune export`: write a model to a file, check it, and time it against its dense export."""

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from tokenprune.cli.console import bar, report, working
from tokenprune.cli.opened import open_model
from tokenprune.cli.options import (
    AdapterName,
    HostName,
    HostWeights,
    Json,
    KeepRatio,
    ModelName,
    Options,
    Pretrained,
    RecipeName,
    Settings,
    output,
)
from tokenprune.cost.profile import profile
from tokenprune.cost.timing import Timing, interleaved
from tokenprune.errors import ExportError
from tokenprune.exporting import FORMATS, ExportReport, format_of, open_exported
from tokenprune.exporting import export as write
from tokenprune.hosts.inputs import draw_inputs
from tokenprune.report.table import Table
from tokenprune.runtime.model import pruning_of

__all__ = ["export"]


def export(
    model: ModelName,
    setting: Settings = None,
    recipe: RecipeName = "",
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"{' or '.join(FORMATS)}. Default: by file name.")
    ] = "",
    file: Annotated[
        Path | None, output("The file. Default: the model's name in this folder.")
    ] = None,
    option: Options = None,
    host: HostName = "",
    adapter: AdapterName = "",
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
    keep_ratio: KeepRatio = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per timed call.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=0, help="Timing rounds of half a second; 0: no timing.")
    ] = 7,
    as_json: Json = False,
) -> None:
    """Write the eval path for any batch size, and compare the file with the model."""
    from tokenprune.cli.runs import prune_by

    asked = format_of(file or "", format or None) if format or file else "onnx"
    wrapped = open_model(
        model,
        [*(setting or ()), *(option or ())],
        recipe=recipe,
        adapter=adapter,
        host=host,
        pretrained=pretrained,
        host_weights=host_weights,
        verify=True,
    ).model
    prune_by(wrapped, keep_ratio)
    target = file or Path(f"{Path(model.rpartition(':')[2]).name}.{asked}")
    with working(f"exporting to {asked}"):
        written = write(wrapped, target, asked)
    dense, timings = None, {}
    if rounds:
        with TemporaryDirectory() as folder:
            # where the dense host cannot be exported, the pruned file is compared with nothing
            with working("exporting the dense host"), suppress(ExportError), wrapped.using("dense"):
                dense = write(wrapped, Path(folder) / f"dense.{asked}", asked)
            timings = _time(wrapped, written, dense, batch_size, rounds)
    ratio = profile(wrapped).ratio
    seconds = {side: timing.seconds for side, timing in timings.items()}
    data = {**asdict(written), "macs": ratio, "batch_size": batch_size, "seconds": seconds}
    report(as_json, data, _table(model, written, dense, timings, ratio, batch_size))


def _time(
    wrapped: Any, pruned: ExportReport, dense: ExportReport | None, batch_size: int, rounds: int
) -> dict[str, Timing]:
    host = pruning_of(wrapped)
    inputs = draw_inputs(host.spec, host.host, batch_size)
    device = next(iter(inputs.values())).device
    calls = {}
    for name, written in (("pruned", pruned), ("dense", dense)):
        if written is not None:
            run = open_exported(written.path, pruned.format, device)
            calls[name] = lambda run=run: run(inputs)
    with bar("timing", "rounds") as step:
        return interleaved(
            calls, rounds=rounds, device=device, after_round=lambda n: step(n + 1, rounds, {})
        )


def _table(
    model: str,
    pruned: ExportReport,
    dense: ExportReport | None,
    timings: dict[str, Timing],
    ratio: float,
    batch_size: int,
) -> Table:
    both = [found for found in (pruned, dense) if found is not None]
    rows = [
        ("size", *(f"{found.num_bytes / 1e6:.1f} MB" for found in both)),
        ("largest deviation from eager", *(f"{found.deviation:.1e}" for found in both)),
    ]
    notes = [
        f"Written to {pruned.path}, batch size open. Compared with the model at batch sizes "
        f"{' and '.join(map(str, pruned.checked))};",
        f"{pruned.tolerance:.0e} of the output's scale is allowed.",
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
    return Table(f"{model} as {pruned.format}", columns, tuple(rows), "\n".join(notes))
