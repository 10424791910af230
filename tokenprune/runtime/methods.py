"""A call of a method that a host has beside its forward."""

from collections.abc import Mapping, Sequence
from types import GeneratorType
from typing import Any

from torch import nn

from tokenprune.analysis.reading import NoBlocksError
from tokenprune.errors import UnsupportedHostError
from tokenprune.hosts.inputs import CallSignature
from tokenprune.runtime.entries import (
    BlocksReached,
    are_stopped,
    called_in,
    check_what_follows,
    run_in,
    stopped_at,
    stopping,
)
from tokenprune.runtime.pruning import Pruning
from tokenprune.tracing.proxy import ValueProxy

__all__ = ["call_method"]


def call_method(
    pruning: Pruning, model: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a method that the host has beside its forward; pruned, if it runs its blocks.

    Raises:
        HostError: In training, what comes after it in the forward must know what was dropped.
        UnsupportedHostError: It returns tokens, and `restore` was left open; or the host calls it,
            while it is traced.
    """
    if any(type(value) is ValueProxy for value in (*args, *kwargs.values())):
        raise UnsupportedHostError(
            f"The host's code calls {name} of the wrapped {type(model).__name__}, which was put "
            "there since, perhaps around itself. Take the host's: host = "
            f"tokenprune.unwrap(model), and decorate host.{name}."
        )
    path = pruning.path(model.training)
    if pruning.runs_host(path):
        return getattr(pruning.host, name)(*args, **kwargs)
    paths = [pruning.spec.blocks[block] for block in pruning.plan.blocks]
    if name not in pruning.entries:
        method = getattr(super(type(model), model), name)
        if are_stopped(pruning.host.modules()):  # a method that is tried itself calls this one
            return method(*args, **kwargs)
        if all(paths):
            staged = called_in(pruning.host, paths)
        else:
            staged = run_in(
                pruning.host, pruning.programs(pruning.as_wrapped()), pruning.plan.blocks
            )
        try:
            with stopped_at(staged):
                given = method(*args, **kwargs)
            return stopping(given, staged, name) if isinstance(given, GeneratorType) else given
        except BlocksReached:
            pruning.entries.add(name)
    try:
        if not all(paths):
            pruning.programs(CallSignature.now(type(pruning.host), name).bind(args, kwargs), name)
        if path == "mask":
            check_what_follows(pruning.host, pruning.programs(pruning.as_wrapped()), name)
        return pruning.run(model, args, kwargs, False, name)
    except NoBlocksError:  # it may have stopped at a module that blocks share with others
        if all(paths):
            raise
        return getattr(pruning.host, name)(*args, **kwargs)
