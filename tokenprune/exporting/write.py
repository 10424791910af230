"""Write a wrapped model to a file that runs without this library, and check the file.

The file is written into a new folder, loaded, and compared with the model itself; it is moved into
place only if both agree.
"""

import inspect
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import ExportError, PlanError
from tokenprune.exporting.check import compare
from tokenprune.exporting.run import (
    Format,
    batched_inputs,
    format_of,
    named_tensors,
    open_exported,
    require_onnx,
)
from tokenprune.files import all_or_nothing
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.runtime.model import pruning_of
from tokenprune.runtime.pruning import Pruning
from tokenprune.tracing.arguments import Arguments, as_arguments
from tokenprune.tracing.hooks import Hooks
from tokenprune.tracing.state import in_mode

__all__ = ["ExportReport", "export"]

CHECKED = (1, 5)
LONGEST_CAUSE = 400  # characters of an exporter's message


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What `export` wrote and found.

    Attributes:
        path: The file.
        format: `onnx` or `pt2`.
        num_bytes: Its size, with the second file of weights (ONNX above 2 GB).
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        checked: Batch sizes at which it was compared with the model; empty if unchecked.
        deviation: Largest difference found, relative to the scale of its output; None if unchecked.
        tolerance: The largest that was allowed.
    """

    path: Path
    format: Format
    num_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    checked: tuple[int, ...]
    deviation: float | None
    tolerance: float | None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    check: bool = True,
) -> ExportReport:
    """Write the eval path of a wrapped model to a file with an open batch size.

    Inside `with model.using(path)` that path is written: with "dense", the host without pruning.
    Kept counts, image size and flags are fixed in the file. The output of a host that returns a
    tensor is named "output"; other hosts' tensors keep their names.

    The file is compared with the model at batch sizes 1 and 5, on random inputs like the
    example. Only inputs are used on which rounding cannot change the kept tokens, by the model's
    own scores; on them the file must agree in every image.

    Args:
        model: What `wrap` returned, in any mode; the mode is restored.
        path: The file. An existing one is replaced only if the new one passes the check.
        format: `onnx` (opset of torch's exporter; weights above 2 GB go into a second file) or
            `pt2` (for `torch.export.load`); by the suffix of `path` if None.
        example_inputs: As for `wrap`.
        check: Load the file and compare it with the model.

    Raises:
        NotWrappedError: `model` was not returned by `wrap`.
        MissingDependencyError: ONNX is asked for and its packages are not installed.
        ExportError: The format is unknown, the model cannot be exported, or the file does not
            compute what the model does. No file is left.

    Example:
        >>> tokenprune.export(model, "pruned.onnx").deviation
    """
    pruning = pruning_of(model)
    chosen = format_of(path, format)
    if chosen == "onnx":
        require_onnx()
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{str(target)!r} is a directory. Name the file to write.")
    example = _two_images(pruning.inputs(example_inputs))
    with in_mode(model, training=False), torch.no_grad():
        _check_exportable(pruning, model, example, chosen)
        program, outputs = _export(model, example)
        # the file comes last: the weights that it may refer to are there when it appears
        with all_or_nothing(target.parent, last=target.name) as folder:
            file = folder / target.name
            _write(type(model).__name__, program, file, chosen, outputs)
            deviation = tolerance = None
            if check:
                device = next(iter(batched_inputs(example).values())).device
                run = open_exported(file, chosen, device)
                deviation, tolerance = compare(model, run, example, CHECKED, str(target))
            num_bytes = sum(part.stat().st_size for part in folder.iterdir())
    return ExportReport(
        path=target,
        format=chosen,
        num_bytes=num_bytes,
        inputs=tuple(example.tensors),
        outputs=outputs,
        checked=CHECKED if check else (),
        deviation=deviation,
        tolerance=tolerance,
    )


def _plain(model: nn.Module, example: Arguments) -> nn.Module:
    """`model` with leaves of a call as arguments, and a tensor or a dict of tensors as output."""
    names, places = tuple(example), example.places

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            output = Arguments({name: given[name] for name in names}, places).call(self.model)
            return output if isinstance(output, Tensor) else named_tensors(output)

    # torch.export uses these names in its checks of the inputs, and cannot read a **kwargs
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    Exported.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("self", *names)]
    )
    return Exported().eval()


def _two_images(example: Arguments) -> Arguments:
    """A batch of one doubled: torch.export specializes a dim of size 1."""
    rows = batched_inputs(example)
    if any(len(value) > 1 for value in rows.values()):
        return example
    return example.with_tensors({name: torch.cat([x, x]) for name, x in rows.items()})


def _check_exportable(
    pruning: Pruning, model: nn.Module, example: Arguments, format: Format
) -> None:
    host = type(model).__name__
    meta_param = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta_param is not None:
        raise ExportError(
            f"Parameter '{meta_param}' of {host} is on the meta device and holds no weights. Load "
            "the weights before exporting."
        )
    if Hooks(pruning.host).of_owner(model):
        raise ExportError(
            f"{host} has forward hooks of its own, which are no part of the model that is written. "
            "Remove them, and do the same in a module around the exported file's program, or in "
            "the host."
        )
    if pruning.forced.keep_indices is not None:
        raise ExportError(
            "keep_indices are forced, and would be written into the file as they are. Leave the "
            "`with model.using(keep_indices=...)` block before exporting."
        )
    narrow = next((n for n, p in model.named_parameters() if p.dtype == torch.bfloat16), None)
    if format == "onnx" and narrow is not None:
        raise ExportError(
            f"Parameter '{narrow}' of {host} is bfloat16, which onnxruntime cannot run here. "
            "Call model.float() or model.half() first, or export as pt2."
        )
    programs, example = pruning.programs(example), pruning.handing(example)
    if example.handed:
        raise ExportError(
            f"{host} hands {', '.join(example.handed)} on as a list, for a loss "
            "that no file can hold. Export it without: example_inputs={'pixel_values': images}."
        )
    if programs.analysis.batch_bound:
        raise ExportError(
            f"The forward of {host} depends on the batch size, so one file cannot serve all sizes. "
            "Run this model with tokenprune."
        )


def _export(model: nn.Module, given: Arguments | Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The program of torch.export, and the names of the outputs."""
    example = as_arguments(type(model).__name__, given)
    outputs = named_tensors(example.call(model))  # also builds the program that torch.export traces
    batch, rows = torch.export.Dim("batch", min=1), batched_inputs(example)
    shapes = {name: {0: batch} if name in rows else None for name in example}
    try:
        program = torch.export.export(
            _plain(model, example), (), dict(example), dynamic_shapes=shapes
        )
    except PlanError:  # of the model, with its own remedy
        raise
    except Exception as error:  # the exporter may refuse in any way
        raise _cannot(type(model).__name__, "torch.export", error) from error
    return program, tuple(outputs)


def _write(host: str, program: Any, file: Path, format: Format, outputs: tuple[str, ...]) -> None:
    if format == "pt2":
        torch.export.save(program, file)
        return
    folding = logging.getLogger("onnxscript.optimizer")
    level = folding.level
    folding.setLevel(logging.ERROR)  # it warns of every operator that it does not fold
    try:
        written = torch.onnx.export(program, dynamo=True, output_names=outputs, verbose=False)
    except Exception as error:  # the exporter may refuse in any way
        raise _cannot(host, "torch's ONNX exporter", error) from error
    finally:
        folding.setLevel(level)
    written.save(file)  # type: ignore[union-attr]


def _cannot(host: str, exporter: str, error: BaseException) -> ExportError:
    while error.__cause__ is not None:  # the first in the chain names the operator
        error = error.__cause__
    cause = shorten(str(error), LONGEST_CAUSE, placeholder=" ...")
    return ExportError(
        f"{host} cannot be exported. {exporter} says: {type(error).__name__}: {cause}\n"
        "Run this model with tokenprune, or compile it with torch.compile."
    )
