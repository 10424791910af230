"""A trace in which containers of tensors are opened, or handed on where code that reads them cannot
be traced."""

from collections.abc import Iterable

from torch import nn

from tokenprune.errors import TraceError
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.handed import ContentsReadError
from tokenprune.tracing.host_graph import HostGraph, trace
from tokenprune.tracing.opaque import LEAVE_OUT, OPAQUE

__all__ = ["trace_call"]


def trace_call(
    host: nn.Module,
    arguments: Arguments,
    entry: str = "forward",
    *,
    stated: Iterable[tuple[nn.Module, str]] = (),
) -> tuple[HostGraph, Arguments]:
    """Trace a call as `trace` does, and the arguments as it takes them: labels whose loss cannot be
    traced are handed on to the module that reads them.

    Raises:
        TraceError: Neither can be traced; what stands in the way of the first.
    """
    stated, found, refused = list(stated), None, None
    try:
        found = trace(host, arguments, entry, stated=stated)
        handed = set(arguments.containers) if _reads_contents(found, arguments) else set()
    except TraceError as error:
        handed, refused = set(arguments.containers), error
    while handed:
        given = arguments.handing(handed)
        try:
            return trace(host, given, entry, stated=stated), given
        except TraceError as error:
            if not isinstance(error.__cause__, ContentsReadError):
                break
            opened = {p for p in handed if error.__cause__.name in given.names_of(p)}
            if not opened:
                break
            handed -= opened
    if refused is None:
        return found, arguments
    names = [str(place) for place in arguments.containers]
    if not names or LEAVE_OUT in str(refused):
        raise refused
    raise TraceError(f"{refused} If {', '.join(sorted(names))} holds labels, {LEAVE_OUT}.")


def _reads_contents(traced: HostGraph, arguments: Arguments) -> bool:
    """Whether a module that runs for real is given what a container holds: it takes any number."""
    held = {name for place in arguments.containers for name in arguments.names_of(place)}
    opaque = (node for node in traced.graph.nodes if OPAQUE in node.meta)
    return any(str(used.target) in held for node in opaque for used in node.all_input_nodes)
