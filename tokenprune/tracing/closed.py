"""Modules that nobody can look into, which are refused."""

import torch
from torch import nn

from tokenprune.errors import UnsupportedHostError

__all__ = ["refuse_closed"]

PACKED = (
    "was quantized by torch.ao.quantization (quantize_dynamic, prepare_qat). Such a module takes "
    "one scale for all tokens of all images, so that dropped tokens would change those that stay. "
    "Quantize with torchao.quantization.quantize_(model, Int8WeightOnlyConfig()) instead."
)
FAKE_QUANTIZED = "torch.ao.quantization.fake_quantize"  # not imported: few have use for it
SCRIPTED = (
    "was made by torch.jit (script or trace), which hides its code, so that nothing can tell how "
    "it mixes tokens. Put the module back that it was made of; tokenprune.export(model, ...) makes "
    "a file of the wrapped model that runs without Python."
)
COMPILED = (
    "was made by torch.compile, whose calls cannot be traced. Put the module back that was "
    "compiled (its `_orig_mod`), and compile the wrapped model instead: torch.compile(model)."
)


def refuse_closed(host: nn.Module) -> None:
    """Refuse modules of torch.ao.quantization, torch.jit and torch.compile.

    Raises:
        UnsupportedHostError: There is one; it is named.
    """
    for path, module in host.named_modules():
        if reason := _reason(module):
            where = path.removesuffix("._packed_params")
            part = f"Module '{where}' of {type(host).__name__}" if where else "The host itself"
            raise UnsupportedHostError(f"{part} {reason}")


def _reason(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if type(module).__module__.startswith("torch._dynamo"):
        return COMPILED
    packed = any(type(value) is torch.ScriptObject for value in dict(vars(module)).values())
    fake = any(cls.__module__ == FAKE_QUANTIZED for cls in type(module).__mro__)
    return PACKED if packed or fake else ""
