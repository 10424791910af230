"""Kernels for CUDA, written in Triton. Each is one operator of `torch.library` and has a plain
version in `tokenprune.ops`, which is its reference in tests and what runs everywhere else.

Files named `*_triton.py` import triton and are imported when a kernel first runs.
"""

from importlib.util import find_spec

from torch import Tensor

__all__ = ["INTERPRETED", "LIBRARY", "kernels_run_on"]

LIBRARY = "tokenprune"
"""The namespace of our operators in `torch.ops`."""

INTERPRETED = False
"""Run on CPU too, in Triton's interpreter: tests set it (with `TRITON_INTERPRET=1`)."""

_TRITON = find_spec("triton") is not None


def kernels_run_on(x: Tensor) -> bool:
    """Whether Triton is there for the device of `x`."""
    return _TRITON and (x.is_cuda or INTERPRETED)
