"""What the nodes of one graph return and cost on meta tensors, remembered by shape: with another
number of tokens at one stage most nodes see what they saw before."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tokenprune.rewrite.settings import SETTINGS, CallSettings

__all__ = ["Remembered"]

PLAIN = (int, float, str, type(None), torch.dtype, torch.device)


class Known(NamedTuple):
    """What a node returned, how that was described then, and its FLOPs."""

    value: Any
    described: Any
    flops: int


class Remembered:
    """Values of nodes and their FLOPs, valid as long as graph and weights stay."""

    def __init__(self) -> None:
        self._known: dict[Any, Known] = {}

    def value(
        self, node: fx.Node, env: Mapping[fx.Node, Any], compute: Callable[[], tuple[Any, int]]
    ) -> tuple[Any, int]:
        """What `compute` returns, which is called where a node has not seen such arguments."""
        try:
            key = node, *(_described(env[used], node) for used in node.all_input_nodes)
        except NotComparableError:
            return compute()
        known = self._known.get(key)
        if known is not None and _described(known.value, node) == known.described:
            return known.value, known.flops
        value, flops = compute()
        if not _changes_its_argument(node):
            with suppress(NotComparableError):
                self._known[key] = Known(value, _described(value, node), flops)
        return value, flops


class NotComparableError(Exception):
    """Nobody knows whether a value is what it was."""


def _changes_its_argument(node: fx.Node) -> bool:
    """Such as `unsqueeze_`, which must do so in each run."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[-1:] == "_" and name[-2:] != "__"


def _described(value: Any, node: fx.Node) -> Any:
    """All that decides about shapes."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return type(value), tuple(value.shape), strides, value.dtype
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, tuple | list):
        return type(value), *(_described(each, node) for each in value)
    if isinstance(value, dict):
        return type(value), *((key, _described(each, node)) for key, each in value.items())
    if isinstance(value, CallSettings):  # a stage, whose number is next, reads its own count alone
        stage = next((after for arg, after in pairwise(node.args) if _is_settings(arg)), None)
        if isinstance(stage, int):
            return value.num_keep[stage]
    raise NotComparableError


def _is_settings(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and arg.target == SETTINGS
