"""Kernels for CUDA, written in Triton. Each is one operator of `torch.library` and has a plain
version in `tokenprune.ops`, which is its reference in tests and what runs everywhere else.

Files named `*_triton.py` import triton and are imported when a kernel first runs.
"""

import os
from importlib.util import find_spec

from torch import Tensor

__all__ = ["LIBRARY", "kernels_run_on"]

LIBRARY = "tokenprune"
"""The namespace of our operators in `torch.ops`."""

_TRITON = find_spec("triton") is not None


def kernels_run_on(x: Tensor) -> bool:
    """Whether Triton runs on the device of `x`: CUDA, or CPU in Triton's interpreter."""
    return _TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
