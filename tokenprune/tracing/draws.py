"""Random numbers that torch draws and Python reads.

Python may decide by such a number only where every draw decides alike: `torch.rand([]) < p` for
p <= 0 or p >= 1. The draw itself is then left out of the graph: nobody needs it, it would put a
random operator into exported files, and a pruned model draws other noise than its host anyway.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from tokenprune.private import DataDependentOutputException

__all__ = ["DRAW", "DrawRead", "certain", "is_drawn", "possible_number"]

DRAW = (
    "Python reads a random number that torch draws, which differs from call to call. Set the "
    "probability of dropping (layerdrop, drop_path) to 0 in this mode, or decide by tensors "
    "(torch.where)"
)
DRAWS = {"rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"}
DRAWS |= {"bernoulli", "bernoulli_", "uniform_", "normal", "normal_", "multinomial", "random_"}
DRAWS |= {"exponential_", "geometric_", "cauchy_", "log_normal_", "poisson", "binomial"}
SIZES = {"size", "numel", "stride", "getattr"}  # numbers about a draw that nobody drew
KEEP_RANGE = {"item", "float", "double", "to", "cpu", "detach", "clone", "getitem", "squeeze"}
KEEP_RANGE |= {"unsqueeze", "view", "reshape", "flatten", "expand", "min", "max"}
KEEP_TRUTH = {"item", "all", "any", "getitem", "squeeze", "to", "cpu"}


class DrawRead(DataDependentOutputException):
    """Python reads a random number that torch drew."""

    def __init__(self) -> None:
        super().__init__(torch.ops.aten._local_scalar_dense.default)


class Range(NamedTuple):
    """Where a draw lies: from `low` up to `high`, which it never reaches."""

    low: Any
    high: Any


def certain(node: fx.Node) -> bool | None:
    """What a comparison of a draw with a number says whatever is drawn; None if that differs."""
    name, args = _name(node), node.args
    if name in KEEP_TRUTH and args and isinstance(args[0], fx.Node):
        return certain(args[0])
    if name not in ("lt", "le", "gt", "ge") or len(args) != 2:
        return None
    below, strict = name in ("lt", "le"), name in ("lt", "gt")
    drawn, number = args
    if not isinstance(drawn, fx.Node):  # p > draw
        drawn, number, below = number, drawn, not below
    found = _range(drawn) if isinstance(drawn, fx.Node) else None
    if found is None or not isinstance(number, int | float):
        return None
    if number >= found.high:
        return below
    if number < found.low or (number == found.low and strict == below):
        return not below
    return None


def possible_number(node: fx.Node) -> float | None:
    """A number that `item()` of a draw may give; None if it is no draw in a known range."""
    found = _range(node)
    return None if found is None else found.low


def is_drawn(node: fx.Node) -> bool:
    """Whether a value is made of draws and of plain numbers alone, of nothing that a call gives."""
    queue, drawn = [node], False
    for found in queue:
        if found.op == "placeholder":
            return False
        name = _name(found)
        drawn = drawn or name in DRAWS
        if name not in SIZES:
            queue += [used for used in found.all_input_nodes if used not in queue]
    return drawn


def _range(node: fx.Node) -> Range | None:
    name, args, kwargs = _name(node), node.args, dict[str, Any](node.kwargs)
    if name in ("rand", "rand_like"):
        return Range(0.0, 1.0)
    if name == "uniform_":
        given: tuple[Any, ...] = (*args[1:], *(0.0, 1.0)[len(args) - 1 :])
        low, high = given[:2]
        low, high = kwargs.get("from", low), kwargs.get("to", high)
        # rounding may reach the upper end of any other range
        return Range(low, high if (low, high) == (0.0, 1.0) else math.nextafter(high, math.inf))
    if name == "randint":
        limits = [limit for limit in args if isinstance(limit, int)][-2:]
        return Range(*(0, *limits)[-2:]) if limits else None
    if name in KEEP_RANGE and args and isinstance(args[0], fx.Node):
        return _range(args[0])
    return None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))
