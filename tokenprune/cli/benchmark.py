"""`tokenprune benchmark`: what pruning gains on this machine."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from tokenprune.cli.console import progress, report
from tokenprune.cli.opened import open_model
from tokenprune.cli.options import (
    AdapterName,
    HostName,
    HostWeights,
    Json,
    ModelName,
    Options,
    Pretrained,
    RecipeName,
    Settings,
    output,
)
from tokenprune.cost.benchmark import benchmark as run
from tokenprune.errors import PlanError

__all__ = ["benchmark"]


def benchmark(
    model: ModelName,
    setting: Settings = None,
    recipe: RecipeName = "",
    adapter: AdapterName = "",
    option: Options = None,
    host: HostName = "",
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8,32",
    device: Annotated[str, typer.Option(help="Default: an accelerator, if there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="Such as bfloat16. Default: the model's own.")] = "",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run every side under torch.compile.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="About how long it may take.")] = 100.0,
    picture: Annotated[Path | None, output("Picture to write: .png, .svg or .pdf.")] = None,
    as_json: Json = False,
) -> None:
    """Time a pruned model against the dense one, and say from which batch size on it pays."""
    wrapped = open_model(
        model,
        [*(setting or ()), *(option or ())],
        recipe=recipe,
        adapter=adapter,
        host=host,
        pretrained=pretrained,
        host_weights=host_weights,
    ).model.eval()
    wrapped.to(_device(device))
    if dtype:
        wrapped.to(_dtype(dtype))
    sizes = _sizes(batch)
    with progress("timing") as step:
        found = run(wrapped, batches=sizes, compiled=compiled, seconds=seconds, progress=step)
    drawn = [] if picture is None else [f"wrote {found.plot(picture)}"]
    report(as_json, found.to_dict(), found.table(), *drawn)


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"--batch is one number of images, or several with commas, found {text!r}. Give "
            "--batch 1,8,32."
        ) from None


def _device(name: str) -> torch.device:
    if name:
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # an AssertionError of torch without CUDA
            raise PlanError(
                f"--device {name!r} cannot be used here: {error}. Leave it out to run on what is "
                "there."
            ) from None
    found: torch.device | None = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(
            f"--dtype {name!r} is no floating-point type of torch. Use float32, bfloat16 or "
            "float16."
        )
    return found
