"""Launch Triton kernels."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["launch"]

_KEPT = 1024
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, options: dict[str, int], **constants: Any
) -> None:
    """Run a kernel on the card of its first argument.

    Triton looks at every argument of every launch, in Python, which takes longer than most of our
    kernels run. A kernel that ran with the same types and alignments before is launched without
    that. A whole number counts by what Triton compiles for: 1, multiples of 16, and its width.

    Args:
        kernel: a function of `triton.jit`.
        grid: how many programs along each axis.
        args: its arguments, the first a tensor.
        options: of the launch: `num_warps`, `num_stages`.
        constants: its `constexpr` arguments, which its signature has last.
    """
    device = args[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        key = id(kernel), device, *map(_kind, args), *constants.values(), *options.values()
        known = _compiled.get(key)
        if known is not None:
            compiled, names, _ = known
            compiled[(*grid, 1, 1)[:3]](*args, *map(constants.__getitem__, names))
            return
        made = kernel[grid](*args, **constants, **options)
    if made is not None:  # by the interpreter
        if len(_compiled) >= _KEPT:
            _compiled.clear()
        _compiled[key] = made, kernel.arg_names[len(args) :], kernel  # whose id must not come again


def _kind(arg: Any) -> Any:
    """What Triton compiles a kernel for."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if isinstance(arg, float):
        return "number"
    return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
