"""Give a host back what running it may change: its attributes and the values of its buffers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Unset", "attributes_kept", "buffers_kept", "caches_emptied", "still_unset", "unset"]


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, hooks included: a host may write to itself in forward
    (a cache, a window size, a capturing hook), and a value of a trace must not stay there."""
    held = [
        kept
        for module in root.modules()
        for kept in (vars(module), *vars(module).values())
        if isinstance(kept, dict | list)
    ]
    before: list[tuple[Any, Any]] = [
        (kept, list(kept) if isinstance(kept, list) else dict(kept)) for kept in held
    ]
    try:
        yield
    finally:
        for kept, values in before:
            if isinstance(kept, list):
                kept[:] = values
            elif not _same(kept, values):
                kept.clear()
                kept.update(values)


@contextmanager
def caches_emptied(root: nn.Module) -> Iterator[None]:
    """Hide what hosts have computed from their parameters and keep for the next call (LeViT's
    position biases): a trace computes it anew. To be used inside `attributes_kept`."""
    for module in root.modules():
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict) and _all_tensors(value):
                value.clear()
    yield


Unset = list[tuple[nn.Module, str]]


def unset(root: nn.Module) -> Unset:
    """The attributes of a host that are None: some get a tensor in the first call."""
    return [(m, name) for m in root.modules() for name, value in vars(m).items() if value is None]


@contextmanager
def still_unset(attributes: Unset) -> Iterator[None]:
    """Show a trace None where a host has kept a tensor since (the table of its newest length): the
    next call may put another one there, so it is no constant of a graph."""
    found = [(m, name, vars(m).get(name)) for m, name in attributes]
    kept = [(m, name, value) for m, name, value in found if isinstance(value, torch.Tensor)]
    for module, name, _ in kept:
        vars(module)[name] = None
    try:
        yield
    finally:
        for module, name, value in kept:
            vars(module)[name] = value


def _all_tensors(values: dict[Any, Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values.values())


@contextmanager
def buffers_kept(root: nn.Module) -> Iterator[None]:
    """Give every buffer its values back: some hosts count their calls in one."""
    before = [(buffer, buffer.clone()) for buffer in root.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _same(ours: dict[Any, Any], theirs: dict[Any, Any]) -> bool:
    """Whether two dicts hold the same objects; what they hold is not compared."""
    return len(ours) == len(theirs) and all(ours.get(k, ours) is v for k, v in theirs.items())
