"""`tokenprune env`: versions and devices, for the report of a fault."""

import platform

import torch

from tokenprune.cli.console import report
from tokenprune.cli.options import Json
from tokenprune.report.table import Table
from tokenprune.versions import version_of

__all__ = ["env", "environment"]

PACKAGES = (
    *("tokenprune-torch", "torch", "timm", "transformers", "peft", "torchao", "accelerate"),
    *("triton", "onnx", "onnxruntime", "safetensors", "huggingface-hub", "numpy"),
)


def env(as_json: Json = False) -> None:
    """Show versions and devices, for the report of a fault."""
    found = environment()
    report(as_json, found, Table("Environment", ("", "found"), tuple(found.items())))


def environment() -> dict[str, str]:
    """Name -> version or device."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    found |= {name: version_of(name) or "not installed" for name in PACKAGES}
    found["torch"] = torch.__version__  # with its build, which metadata leave out
    found["threads"] = str(torch.get_num_threads())
    found["CUDA of torch"] = str(torch.version.cuda or "none")
    for number in range(torch.cuda.device_count()):
        found[f"device {number}"] = torch.cuda.get_device_name(number)
    return found
