"""One traced call of a host: its graph, and the stretch of it that each module call made."""

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from tokenprune.errors import HostError, TokenPruneError, TraceError, UnsupportedHostError
from tokenprune.notices import warn_once
from tokenprune.private import FakeTensorMode, without_modes
from tokenprune.tracing.arguments import Arguments, as_arguments
from tokenprune.tracing.calls import MODULE, ModuleCall, calls_of
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.guards import Guards
from tokenprune.tracing.handed import HANDED
from tokenprune.tracing.hooks import Hooks
from tokenprune.tracing.names import Reached, reached_by
from tokenprune.tracing.opaque import reason_of
from tokenprune.tracing.parts import cut_evenly
from tokenprune.tracing.provenance import Drawn, Provenance
from tokenprune.tracing.randomness import Generators
from tokenprune.tracing.remains import CannotRepeatError
from tokenprune.tracing.stand_ins import stand_ins
from tokenprune.tracing.state import buffers_kept, no_autocast_cache
from tokenprune.tracing.tracer import ONE_AT_A_TIME, ValueTracer

__all__ = ["HostGraph", "ModuleCall", "explained", "trace", "untraceable"]


@dataclass(frozen=True)
class HostGraph:
    """The graph of one call signature.

    Attributes:
        host: Class of the host.
        graph: As the host wrote it, less what it computes and nobody reads.
        fake_mode: The mode that the values in `node.meta["val"]` belong to.
        batch_size: B.
        specialized: Nodes whose value Python read.
        ambient: The modes that Python read or changed -> the caller's when this was traced. It
            holds for calls in the same ones (`modes.ambient_holds`).
        calls: Module path -> its calls, in order.
        guards: What else it depends on.
    """

    host: str
    graph: fx.Graph
    fake_mode: FakeTensorMode
    batch_size: int
    specialized: tuple[fx.Node, ...]
    ambient: Mapping[str, Any]
    calls: Mapping[str, tuple[ModuleCall, ...]]
    guards: Guards

    @property
    def inputs(self) -> dict[str, fx.Node]:
        """Placeholders of tensors by the names of the host's arguments."""
        nodes = self.graph.find_nodes(op="placeholder")
        return {str(node.target): node for node in nodes if HANDED not in node.meta}

    def output_of(self, path: str) -> fx.Node | None:
        """What the last call of a module returned; None if it does not run or returns no tensor."""
        outputs = [call.output for call in self.calls.get(path, ()) if call.output is not None]
        return outputs[-1] if outputs else None

    def copy(self) -> "HostGraph":
        """The same with a graph of its own: blocks and stages that are marked in one are not marked
        in the other."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        output, was = graph.output(graph.graph_copy(self.graph, copies)), self.graph.output_node()
        output.meta, copies[was] = dict(was.meta), output
        calls, read = map_arg((dict(self.calls), self.specialized), copies.__getitem__)
        return replace(self, graph=graph, calls=calls, specialized=read)


def trace(
    host: nn.Module,
    arguments: Arguments | Mapping[str, Any],
    entry: str = "forward",
    *,
    stated: Iterable[tuple[nn.Module, str]] = (),
) -> HostGraph:
    """Trace a call of the method `entry` of a host, which is left as it was.

    Args:
        arguments: Of the call, by name. Tensors become inputs, everything else is specialized on.
        stated: Attributes that are watched though the host's code may not read them.

    Raises:
        HostError: The host itself refuses these arguments, or returns no tensor.
        TraceError: Its code cannot be traced; the line of its source is named.
    """
    with ONE_AT_A_TIME:  # each looks at all objects and generators of the process
        return _trace(host, arguments, entry, stated)


def _trace(
    host: nn.Module,
    arguments: Arguments | Mapping[str, Any],
    entry: str,
    stated: Iterable[tuple[nn.Module, str]],
) -> HostGraph:
    call, given = getattr(host, entry), as_arguments(type(host).__name__, arguments)
    known = reached_by(host, call)
    emptied = known.caches()
    for cached in emptied:  # it may have values of calls before
        cached.cache_clear()
    for again in (True, False):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        # a mode of the caller (a counter of operations, say) is not to see the trace
        unseen = without_modes()
        with unseen, stand_ins(host, mode), no_autocast_cache(), buffers_kept(host):
            tracer, generators = ValueTracer(host, mode), Generators(host, known)
            try:
                graph = (context := copy_context()).run(tracer.record, call, given, known)
            except TokenPruneError:
                raise
            except Exception as error:
                if not (_filled_before(emptied, tracer, call) and again):
                    raise _explained(error, tracer, host, arguments) from error
                continue
            finally:
                moved = generators.moved()
                generators.restore()
            if moved:
                repeated = partial(ValueTracer(host, mode).record, call, given, known)
                _refuse_draw(generators.first_draw(repeated), host, arguments)
            _refuse_draw(tracer.reads.drawn, host, arguments)
        if not (_filled_before(emptied, tracer, call) and again):
            break
    kept = tracer.leaked()
    if kept is not None:
        raise untraceable(
            type(host).__name__,
            _shapes(arguments),
            kept,
            "this tensor is kept in a list or dict that is no attribute of a module, which a "
            "pruned call would not fill; keep it in the module, or use a forward hook",
        )
    if not graph.output_node().all_input_nodes:
        raise HostError(
            f"{type(host).__name__} returns no tensor for the input {_shapes(arguments)}. Wrap a "
            "model whose output is a tensor, or holds some in tuples, dicts or dataclasses."
        )
    for owner, name in stated:
        tracer.reads.stated(owner, name)
    left = tracer.left
    hooked = (*tracer.opened, *tracer.reads.leaves.values())
    guards = Guards(tracer.reads, tracer.functions, left.counted, hooked, Hooks(host))
    opaque = {f"{type(w.owner).__name__}.{w.name}": "another each time" for w in guards.unsteady}
    for what, which in (tracer.reads.opaque | opaque).items():
        warn_once(
            host,
            f"cannot watch {what}",
            f"The forward of {type(host).__name__} reads {what} ({which}). What it gave is a "
            "constant of what wrap has made, and nothing can see that it would be another now: "
            "call tokenprune.clear_cache(model) after a change, or read it outside of forward.",
        )
    read = set(tracer.specialized)
    lost = [f"sets {what}" for what in (*left.lost, *_changed_in(context))]
    for what in lost + [f"prints ({line})" for line in tracer.reads.prints]:
        warn_once(
            host,
            f"does not repeat: {what}",
            f"The forward of {type(host).__name__} {what}, which a pruned call does not. Keep a "
            "value in an attribute of a module, which is set, or do it in a forward hook.",
        )
    for line in tracer.reads.types:
        warn_once(
            host,
            f"compares types: {line}",
            f"The forward of {type(host).__name__} compares type(...) with a class of tensors at "
            f"{line}, which is never true in a trace. Use isinstance(...) there.",
        )
    cut_evenly(graph)
    graph.eliminate_dead_code(lambda node: node in read or has_effect(node))
    for node in graph.find_nodes(op="call_module"):
        module = host.get_submodule(str(node.target))
        node.meta[MODULE] = type(module), repr(module)
    first = next(node for node in graph.nodes if node.op == "placeholder")
    return HostGraph(
        host=type(host).__name__,
        graph=graph,
        fake_mode=tracer.fake_mode,
        batch_size=int(first.meta["val"].shape[0]),
        specialized=tuple(tracer.specialized),
        ambient=dict(tracer.ambient),
        calls=calls_of(graph, tracer.calls),
        guards=guards,
    )


def _filled_before(emptied: list[Any], tracer: ValueTracer, call: Any) -> bool:
    """Empty each `lru_cache` that the host's code uses: it may hold values of the trace. Whether
    one that was not `emptied` may have given it values of a call before."""
    reached = tracer.reached or Reached([call, *tracer.reads.functions()])
    filled = [cached for cached in reached.caches() if cached.cache_info().currsize]
    for cached in filled:
        cached.cache_clear()
    return any(cached not in emptied for cached in filled)


def _changed_in(context: Context) -> list[str]:
    """The context variables that have another value in a context than now."""
    now = copy_context()
    return [f"ContextVar {v.name}" for v, value in context.items() if now.get(v, now) is not value]


def _refuse_draw(drawn: Drawn | None, host: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Raise if the host moved a generator; another thread may have done it."""
    if drawn is not None:
        reason = (
            f"Python draws from {drawn.generator}, and a trace would freeze the number. Set the "
            "probability of dropping to 0 in this mode, or draw and decide by torch's tensors"
        )
        shapes = _shapes(arguments)
        raise untraceable(type(host).__name__, shapes, Provenance("", *drawn.where), reason)


def _explained(
    error: Exception, tracer: ValueTracer, root: nn.Module, arguments: Mapping[str, Any]
) -> TokenPruneError:
    own = error.where if isinstance(error, CannotRepeatError) else None
    shapes, line = _shapes(arguments), own or tracer.failed_at(error)
    said = f"{type(error).__name__}: {error}".rstrip(" .:")
    prepared = ": what its own pre-hooks return, which run in calls alone"
    before = prepared if root._forward_pre_hooks else ""
    if isinstance(error, AssertionError | ValueError):  # a check of the host's own
        return HostError(
            f"{type(root).__name__} refused the input {shapes} at {line}. It said: {said}. Give "
            f"it an input that it takes by itself{before}."
        )
    reason = (reason_of(error) or said) + before
    return untraceable(type(root).__name__, shapes, line, reason)


@contextmanager
def explained(host: nn.Module) -> Iterator[None]:
    """An UnsupportedHostError in the place of whatever nothing in this library foresaw."""
    try:
        yield
    except (TokenPruneError, Warning, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unexpected(host, error) from error


def _unexpected(host: nn.Module, error: Exception) -> UnsupportedHostError:
    steps = traceback.extract_tb(error.__traceback__)
    python, torchs = Path(traceback.__file__).parent, Path(torch.__file__).parent
    others = tuple(map(str, (Path(__file__).parents[1], torchs, python)))
    packages = tuple(str(python / name) for name in ("site-packages", "dist-packages"))
    of_host = [
        step
        for step in steps
        if not step.filename.startswith(others)
        or (step.filename.startswith(packages) and not step.filename.startswith(others[:2]))
    ]
    line = of_host[-1] if of_host else steps[-1]
    said = f"{type(error).__name__}: {error}".rstrip(" .:")
    return UnsupportedHostError(
        f"{type(host).__name__} was to be wrapped, but at {line.filename}:{line.lineno} "
        f"({line.line}) came {said}. If a smaller part of the model holds "
        "its blocks, wrap that part: model.encoder = tokenprune.wrap(model.encoder, ...)."
    )


def untraceable(host: str, shapes: dict[str, Any], line: Any, reason: str) -> TraceError:
    """The error for a line of the host's source that no graph can hold."""
    return TraceError(
        f"The forward of {host} cannot be traced for the input {shapes}: stopped at {line}. "
        f"Reason: {reason}."
    )


def _shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    shapes = {n: tuple(v.shape) for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    return {**arguments, **shapes}
