"""Put back what running a host may change: attributes, buffers, modes, autocast's cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokenprune.tracing.stand_ins import is_plain

__all__ = [
    "LazyAttributes",
    "attributes_kept",
    "buffers_kept",
    "empty_caches",
    "hide_lazy_tensors",
    "kept_modes",
    "lazy_attributes",
    "no_autocast_cache",
]


@contextmanager
def attributes_kept(root: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, hooks included: a host may write to itself in forward
    (a cache, a window size, a capturing hook), and a value of a trace must not stay there."""
    before: list[tuple[Any, Any]] = [
        (kept, dict(kept) if isinstance(kept, dict) else list(kept))
        for module in root.modules()
        for kept in (vars(module), *vars(module).values())
        if isinstance(kept, dict | list)
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


def empty_caches(root: nn.Module) -> None:
    """Take out what hosts have computed from their parameters and keep for the next call (LeViT's
    position biases): a trace computes it again. To be used inside `attributes_kept`."""
    for module in root.modules():
        for name, value in vars(module).items():
            cache = value if "cache" in name and isinstance(value, dict) else {}
            if all(isinstance(kept, torch.Tensor) for kept in cache.values()):
                cache.clear()


LazyAttributes = list[tuple[nn.Module, str]]


def lazy_attributes(root: nn.Module) -> LazyAttributes:
    """The attributes of a host that are None: some get a tensor in the first call."""
    return [(m, name) for m in root.modules() for name, value in vars(m).items() if value is None]


@contextmanager
def hide_lazy_tensors(attributes: LazyAttributes) -> Iterator[None]:
    """Set lazy attributes back to None during a trace: a tensor that a host keeps there (the table
    of its newest length) is replaced by the next call, so it is no constant of a graph."""
    found = [(module, name, vars(module).get(name)) for module, name in attributes]
    kept = [entry for entry in found if isinstance(entry[2], torch.Tensor)]
    for module, name, _ in kept:
        vars(module)[name] = None
    try:
        yield
    finally:
        for module, name, value in kept:
            vars(module)[name] = value


@contextmanager
def buffers_kept(root: nn.Module) -> Iterator[None]:
    """Give every buffer its values back: some hosts count their calls in one."""
    own = (b for b in root.buffers() if is_plain(b) and not b.is_meta)
    before = [(buffer, buffer.clone()) for buffer in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own training flag back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Autocast keeps the weights it has cast; those cast under fake tensors must not be kept."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


def _same(ours: dict[Any, Any], theirs: dict[Any, Any]) -> bool:
    """Whether two dicts hold the same objects; what they hold is not compared."""
    return len(ours) == len(theirs) and all(ours.get(k, ours) is v for k, v in theirs.items())
