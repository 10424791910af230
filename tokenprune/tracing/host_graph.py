"""One traced call of a host: its graph, and the stretch of it that each module call made."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenprune.errors import HostError, TokenPruneError, TraceError
from tokenprune.tracing.arguments import Arguments, as_arguments
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.opaque import reason_of
from tokenprune.tracing.provenance import Provenance
from tokenprune.tracing.randomness import Drawn, Generators
from tokenprune.tracing.stand_ins import stand_ins
from tokenprune.tracing.state import buffers_kept, no_autocast_cache
from tokenprune.tracing.tracer import NUMBER, ValueTracer

__all__ = ["HostGraph", "ModuleCall", "trace", "untraceable"]


class ModuleCall(NamedTuple):
    """One call of a module.

    Attributes:
        path: Of the module.
        number: Which of its calls it is, from 0.
        inputs: Its tensor arguments, in order; None for one that nobody reads.
        output: The first tensor that it returned; None if there is none, or nobody reads it.
        first: The first node that it made; None if it made none that is left.
        last: The last one.
    """

    path: str
    number: int
    inputs: tuple[fx.Node | None, ...]
    output: fx.Node | None
    first: fx.Node | None
    last: fx.Node | None

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes that it made, in order."""
        node = self.first
        while node is not None:
            yield node
            node = None if node is self.last else node.next


@dataclass(frozen=True)
class HostGraph:
    """The graph of one call signature.

    Attributes:
        host: Class of the host.
        graph: As the host wrote it, less what it computes and nobody reads.
        fake_mode: The mode that the values in `node.meta["val"]` belong to.
        batch_size: B.
        specialized: Nodes whose value Python read.
        calls: Module path -> its calls, in order.
    """

    host: str
    graph: fx.Graph
    fake_mode: FakeTensorMode
    batch_size: int
    specialized: tuple[fx.Node, ...]
    calls: Mapping[str, tuple[ModuleCall, ...]]

    @property
    def inputs(self) -> dict[str, fx.Node]:
        """Placeholders by the names of the host's arguments."""
        return {str(node.target): node for node in self.graph.find_nodes(op="placeholder")}

    def output_of(self, path: str) -> fx.Node | None:
        """What the last call of a module returned; None if it does not run or returns no tensor."""
        outputs = [call.output for call in self.calls.get(path, ()) if call.output is not None]
        return outputs[-1] if outputs else None


def trace(host: nn.Module, arguments: Arguments | Mapping[str, Any]) -> HostGraph:
    """Trace a call of `host.forward`; the host is left as it was.

    Args:
        arguments: Of the call, by name. Tensors become inputs, everything else is specialized on.

    Raises:
        HostError: The host itself refuses these arguments, or returns no tensor.
        TraceError: Its code cannot be traced; the line of its source is named.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = as_arguments(type(host).__name__, arguments)
    with stand_ins(host, mode), no_autocast_cache(), buffers_kept(host):
        tracer, generators = ValueTracer(host, mode), Generators(host)
        try:
            graph = tracer.record(host.forward, given)
        except TokenPruneError:
            raise
        except Exception as error:
            raise _explained(error, tracer, host, arguments) from error
        finally:
            moved = generators.moved()
            generators.restore()
        if moved:
            again = partial(ValueTracer(host, mode).record, host.forward, given)
            _refuse_draw(generators.first_draw(again), host, arguments)
    if not graph.output_node().all_input_nodes:
        raise HostError(
            f"{type(host).__name__} returns no tensor for the input {_shapes(arguments)}. Wrap a "
            "model whose output is a tensor, or holds some in tuples, dicts or dataclasses."
        )
    read = set(tracer.specialized)
    graph.eliminate_dead_code(lambda node: node in read or has_effect(node))
    first = next(node for node in graph.nodes if node.op == "placeholder")
    return HostGraph(
        host=type(host).__name__,
        graph=graph,
        fake_mode=tracer.fake_mode,
        batch_size=int(first.meta["val"].shape[0]),
        specialized=tuple(tracer.specialized),
        calls=_calls(graph, tracer),
    )


def _refuse_draw(drawn: Drawn | None, host: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raise if the host moved a generator; another thread may have done it."""
    if drawn is not None:
        reason = (
            f"Python draws from {drawn.generator}, and a trace would freeze the number. Set the "
            "probability of dropping to 0 in this mode, or draw and decide by torch's tensors"
        )
        shapes = _shapes(arguments)
        raise untraceable(type(host).__name__, shapes, Provenance("", *drawn.where), reason)


def _calls(graph: fx.Graph, tracer: ValueTracer) -> dict[str, tuple[ModuleCall, ...]]:
    """The recorded calls, in terms of the nodes that are left."""
    nodes = list(graph.nodes)
    alive, numbers = set(nodes), [node.meta[NUMBER] for node in nodes]
    calls: dict[str, list[ModuleCall]] = {}
    for path, inputs, output, start, stop in sorted(tracer.calls, key=lambda call: call.start):
        made = nodes[bisect_left(numbers, start) : bisect_left(numbers, stop)]
        first, last = (made[0], made[-1]) if made else (None, None)
        given = tuple(node if node in alive else None for node in inputs)
        returned = output if output in alive else None
        known = calls.setdefault(path, [])
        known.append(ModuleCall(path, len(known), given, returned, first, last))
    return {path: tuple(found) for path, found in calls.items()}


def _explained(
    error: Exception, tracer: ValueTracer, root: nn.Module, arguments: Mapping[str, Any]
) -> TokenPruneError:
    shapes, line = _shapes(arguments), tracer.failed_at(error)
    said = f"{type(error).__name__}: {error}".rstrip(" .:")
    if isinstance(error, AssertionError | ValueError):  # a check of the host's own
        return HostError(
            f"{type(root).__name__} refused the input {shapes} at {line}. It said: {said}. Give "
            "it an input that it takes by itself."
        )
    reason = reason_of(error) or said
    return untraceable(type(root).__name__, shapes, line, reason)


def untraceable(host: str, shapes: dict[str, Any], line: Any, reason: str) -> TraceError:
    """The error for a line of the host's source that no graph can hold."""
    return TraceError(
        f"The forward of {host} cannot be traced for the input {shapes}: stopped at {line}. "
        f"Reason: {reason}."
    )


def _shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {n: tuple(v.shape) for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    return {**arguments, **shapes}
