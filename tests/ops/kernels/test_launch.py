"""A kernel is launched again without Triton's look at its arguments, but only as compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenprune.ops.kernels.launch import launch


class Kernel:
    """Stands for a function of `triton.jit`, and for what it compiles to."""

    arg_names = ("X", "N", "eps", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def first(*args: Any, **constants: Any) -> Any:
            self.compiled.append((grid, args, constants))
            return Compiled(self)

        return first


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.kernel.again.append((grid, args))


def run(kernel: Kernel, x: Tensor, count: int = 3, eps: float = 0.5, **changed: Any) -> None:
    constants = {"BLOCK": 16, "FLAG": False, **changed}
    launch(kernel, (2, count), x, count, eps, options={"num_warps": 4}, **constants)


def test_the_same_arguments_at_other_places_are_not_compiled_again() -> None:
    kernel, first, second = Kernel(), torch.zeros(8), torch.ones(16)
    run(kernel, first)
    run(kernel, second, count=5, eps=0.25)
    assert len(kernel.compiled) == 1
    ((grid, args),) = kernel.again
    assert grid == (2, 5, 1)
    assert args[0] is second
    assert args[1:] == (5, 0.25, 16, False)


def test_what_triton_compiles_for_is_compiled_again() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    run(kernel, x)
    run(kernel, x.double())
    run(kernel, x[1:])  # another alignment
    run(kernel, x, count=1)
    run(kernel, x, count=32)
    run(kernel, x, count=2**40)
    run(kernel, x, BLOCK=32)
    run(kernel, x, FLAG=True)
    assert len(kernel.compiled) == 8
    assert not kernel.again
