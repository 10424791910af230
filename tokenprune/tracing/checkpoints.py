"""Gradient checkpointing that a host asks for: which nodes it recomputes in the backward pass.

`torch.utils.checkpoint.checkpoint` itself may be held anywhere (imported by name, in a partial), so
what it calls is patched: its generator, which it runs before and after the function, and the
autograd function of its reentrant variant.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import Parameter
from typing import Any, NamedTuple, Protocol
from unittest import mock

from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["CHECKPOINT", "Checkpoint", "checkpoints_recorded"]

CHECKPOINT = "checkpoint"
"""Key in a node's `meta`: the `Checkpoint` that it was made in."""

# Two names since torch 2.14, one before.
GENERATORS = [n for n in dir(checkpoint) if n.startswith("_checkpoint_without_reentrant_generator")]
NO_OPTIONS = ("fn", "args", "kwargs")


class Checkpoint(NamedTuple):
    """One call of `checkpoint`: its own number, and the options that are not the usual ones."""

    number: int
    options: Mapping[str, Any]


class Recorder(Protocol):
    """A tracer. If `executing`, calls run as they are."""

    @property
    def executing(self) -> bool: ...

    def checkpointed(self, options: Mapping[str, Any]) -> AbstractContextManager[None]: ...


@contextmanager
def checkpoints_recorded(tracer: Recorder) -> Iterator[None]:
    """Tell `tracer` which calls the host checkpoints, and run them as they are."""
    with ExitStack() as stack:
        for name in GENERATORS:
            around = _generator(tracer, getattr(checkpoint, name))
            stack.enter_context(mock.patch.object(checkpoint, name, around))
        apply = staticmethod(_reentrant(tracer, CheckpointFunction.apply))
        stack.enter_context(mock.patch.object(CheckpointFunction, "apply", apply))
        yield


def _generator(tracer: Recorder, original: Callable[..., Any]) -> Callable[..., Iterator[None]]:
    signature = inspect.signature(original)
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    usual = {n: p.default for n, p in signature.parameters.items() if p.kind in named}

    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        if tracer.executing:
            yield from original(*args, **kwargs)
            return
        given = signature.bind(*args, **kwargs).arguments
        known = {n: given[n] for n in usual if n in given and n not in NO_OPTIONS}
        with tracer.checkpointed({n: v for n, v in known.items() if v != usual[n]}):
            yield

    return around


def _reentrant(tracer: Recorder, original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if tracer.executing:
            return original(function, preserve_rng_state, *args)
        options = {} if preserve_rng_state else {"preserve_rng_state": False}
        with tracer.checkpointed(options):
            return function(*args)

    return apply
