"""Kernels for CUDA, written in Triton. Each is one operator of `torch.library` and has a plain
version in `tokenprune.ops`, which is its reference in tests and what runs everywhere else.

Files named `*_triton.py` import triton and are imported when a kernel first runs.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenprune.private import exporting

__all__ = ["INTERPRETED", "define", "kernels_run_on"]

INTERPRETED = False
"""Run on CPU too, in Triton's interpreter: tests set it (with `TRITON_INTERPRET=1`)."""

_LIBRARY: Any = torch.library.Library("tokenprune", "FRAGMENT")  # type: ignore[no-untyped-call]
# On AMD's cards (ROCm) they were never run: the plain versions run there.
_TRITON = find_spec("triton") is not None and torch.version.hip is None


def kernels_run_on(x: Tensor) -> bool:
    """Whether Triton is there for the device of `x`; a file to be exported holds no kernel of
    ours."""
    return _TRITON and (x.is_cuda or INTERPRETED) and not exporting()


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """Register `torch.ops.tokenprune.name`: `run` is what it does, `fake` makes empty results,
    `flops` counts its FLOPs from the shapes of its arguments.

    Returns:
        The operator.
    """
    _LIBRARY.define(name + schema)
    for device in ("CUDA", "CPU"):  # CPU is Triton's interpreter
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"tokenprune::{name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.tokenprune, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default
