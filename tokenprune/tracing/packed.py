"""Weights that torch.ao has packed away, which are refused."""

import torch
from torch import nn

from tokenprune.errors import UnsupportedHostError

__all__ = ["refuse_packed"]


def refuse_packed(host: nn.Module) -> None:
    """Refuse modules of torch.ao.quantization.

    Raises:
        UnsupportedHostError: There is one; it is named.
    """
    for path, module in host.named_modules():
        if any(type(value) is torch.ScriptObject for value in dict(vars(module)).values()):
            where = path.removesuffix("._packed_params")
            raise UnsupportedHostError(
                f"Module '{where}' of {type(host).__name__} was quantized by torch.ao.quantization "
                "(quantize_dynamic). Such a module takes one scale for all tokens of all images, "
                "so that dropped tokens would change those that stay. Quantize with "
                "torchao.quantization.quantize_(model, Int8WeightOnlyConfig()) instead."
            )
