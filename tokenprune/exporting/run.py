"""Run files that `tokenprune.export` wrote, without the host's code."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenprune.errors import ExportError, MissingDependencyError

__all__ = [
    "FORMATS",
    "Format",
    "Run",
    "batched_inputs",
    "format_of",
    "named_tensors",
    "open_exported",
    "require_onnx",
]

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = get_args(Format)
ONLY = "output"

# Inputs by name -> outputs by name.
Run = Callable[[Mapping[str, Any]], dict[str, Tensor]]


def format_of(path: str | os.PathLike[str], asked: str | None) -> Format:
    """The given format, or the format of the file's suffix.

    Raises:
        ExportError: There is no such format.
    """
    for known in FORMATS:
        if asked == known or (asked is None and Path(path).suffix == f".{known}"):
            return known
    found = f"format {asked!r}" if asked is not None else f"{str(path)!r}"
    raise ExportError(
        f"A model is exported as {' or '.join(map(repr, FORMATS))}, found {found}. Pass format=, "
        "or give the file one of these endings."
    )


def require_onnx() -> None:
    """Raise MissingDependencyError unless what writes and runs ONNX files is installed."""
    try:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            import_module(package)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"ONNX export needs {error.name}, which is not installed. "
            "Run: pip install 'tokenprune-torch[export]'"
        ) from error


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of an output by name: a single one is "output", nested ones are "a.0"."""
    if isinstance(output, Tensor):
        return {name or ONLY: output}
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, tuple | list):
        parts = enumerate(output)
    elif is_dataclass(output):
        parts = ((field.name, getattr(output, field.name)) for field in fields(output))
    found: dict[str, Tensor] = {}
    for key, part in parts:
        found |= named_tensors(part, f"{name}.{key}" if name else str(key))
    return found


def batched_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs whose dim 0 is the batch, as it is in the first tensor."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    size = next(iter(tensors.values())).shape[0]
    return {name: value for name, value in tensors.items() if value.ndim and len(value) == size}


def open_exported(
    path: str | os.PathLike[str], format: Format | None = None, device: torch.device | str = "cpu"
) -> Run:
    """Load an exported file.

    Args:
        path: What `export` wrote.
        format: As for `export`.
        device: Of the outputs. ONNX runs on the CPU, with as many threads as torch.

    Returns:
        A function of the inputs by name that returns the outputs by name.

    Raises:
        ExportError: The format is unknown.
        MissingDependencyError: onnxruntime is not installed.
    """
    if format_of(path, format) == "pt2":
        module = torch.export.load(path).module()

        def run_pt2(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            with torch.no_grad():
                return named_tensors(module(**inputs))

        return run_pt2

    require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    input_names = [value.name for value in session.get_inputs()]
    output_names = [value.name for value in session.get_outputs()]

    def run_onnx(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        arrays = {name: inputs[name].detach().cpu().numpy() for name in input_names}
        found = session.run(output_names, arrays)
        tensors = (torch.from_numpy(array).to(device) for array in found)
        return dict(zip(output_names, tensors, strict=True))

    return run_onnx
