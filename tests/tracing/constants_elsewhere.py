"""Tensors in another Python module than the host's."""

import torch
from torch import Tensor

from tests.tracing.function_host import WIDTH

__all__ = ["TABLE", "Tables", "shifted"]

TABLE = torch.randn(5, WIDTH)
_SHIFT = torch.randn(WIDTH)


class Tables:
    bias = torch.randn(WIDTH)


def shifted(x: Tensor) -> Tensor:
    return x + _SHIFT.new_full((x.shape[0], 1, 1), 2.0) * _SHIFT
