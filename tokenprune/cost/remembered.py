"""What the nodes of one graph return and cost on meta tensors, remembered by shape: with another
number of tokens at one stage most nodes see what they saw before."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tokenprune.rewrite.settings import CallSettings

__all__ = ["Remembered"]

PLAIN = (int, float, str, type(None), torch.dtype, torch.device)


class Known(NamedTuple):
    """What a node returned, how that was described then, and its FLOPs."""

    value: Any
    described: Any
    flops: int


class Counts(tuple[int, ...]):
    """The K of each stage; notes which are read."""

    read: set[int]

    def __getitem__(self, stage: Any) -> Any:
        numbers = range(len(self))[stage]
        self.read.update(numbers if isinstance(numbers, range) else (numbers,))
        return super().__getitem__(stage)

    def __iter__(self) -> Iterator[int]:
        self.read.update(range(len(self)))
        return super().__iter__()


class Remembered:
    """Values of nodes and their FLOPs, valid as long as graph and weights stay."""

    def __init__(self) -> None:
        self._known: dict[Any, Known] = {}
        self._read = defaultdict[fx.Node, set[int]](set)
        self._counts = Counts()

    def settings(self, num_keep: tuple[int, ...]) -> CallSettings:
        """What the next run is given."""
        self._counts = Counts(num_keep)
        self._counts.read = set()
        return CallSettings(num_keep=self._counts, sample=False)

    def value(
        self, node: fx.Node, env: Mapping[fx.Node, Any], compute: Callable[[], tuple[Any, int]]
    ) -> tuple[Any, int]:
        """What `compute` returns, which is called where a node has not seen such arguments and
        counts of the stages that it reads."""
        try:
            given = [_described(env[used]) for used in node.all_input_nodes]
        except NotComparableError:
            return compute()
        known = self._known.get(self._key(node, given))
        if known is not None and _described(known.value) == known.described:
            return known.value, known.flops
        counts = self._counts
        counts.read = set()
        value, flops = compute()
        self._read[node] |= counts.read
        if not _changes_its_argument(node):
            with suppress(NotComparableError):
                self._known[self._key(node, given)] = Known(value, _described(value), flops)
        return value, flops

    def _key(self, node: fx.Node, given: list[Any]) -> Any:
        counts = tuple.__getitem__
        return node, *given, *((n, counts(self._counts, n)) for n in sorted(self._read[node]))


class NotComparableError(Exception):
    """Nobody knows whether a value is what it was."""


def _changes_its_argument(node: fx.Node) -> bool:
    """Such as `unsqueeze_`, which must do so in each run."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name[-1:] == "_" and name[-2:] != "__"


def _described(value: Any) -> Any:
    """All that decides about shapes; of settings nothing, since what is read of them is noted."""
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else ()
        return type(value), tuple(value.shape), strides, value.dtype
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, tuple | list):
        return type(value), *map(_described, value)
    if isinstance(value, dict):
        return type(value), *((key, _described(each)) for key, each in value.items())
    if isinstance(value, CallSettings):
        return CallSettings
    raise NotComparableError
