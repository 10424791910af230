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
    stated, refused = list(stated), None
    found: tuple[HostGraph, Arguments] | None = None
    try:
        found = trace(host, arguments, entry, stated=stated), arguments
    except TraceError as error:
        refused = error
    open_ = found is None or _reads_contents(*found)
    handed = set(arguments.containers) if open_ else set()
    while handed:
        given = arguments.handing(handed)
        try:
            return trace(host, given, entry, stated=stated), given
        except TraceError as error:
            looked_into = getattr(error.__cause__, "name", None)
            opened = {place for place in handed if looked_into in given.names_of(place)}
            if not isinstance(error.__cause__, ContentsReadError) or not opened:
                break
            handed -= opened
    if found is not None:
        return found
    names = sorted(map(str, arguments.containers | arguments.handed_places))
    if not names or LEAVE_OUT in str(refused):
        raise refused  # type: ignore[misc]
    raise TraceError(f"{refused} If a loss reads {', '.join(names)}, {LEAVE_OUT}.") from refused


def _reads_contents(traced: HostGraph, arguments: Arguments) -> bool:
    """Whether a module that runs for real is given what a container holds: it takes any number."""
    held = {name for place in arguments.containers for name in arguments.names_of(place)}
    opaque = (node for node in traced.graph.nodes if OPAQUE in node.meta)
    return any(str(used.target) in held for node in opaque for used in node.all_input_nodes)
