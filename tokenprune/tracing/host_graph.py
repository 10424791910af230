"""One traced call of a host: its graph, and what else a rewrite needs to know about it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tokenprune.analysis.token_probe import stage_markers
from tokenprune.errors import HostError, TokenPruneError, TraceError
from tokenprune.tracing.effects import has_effect
from tokenprune.tracing.tracer import ValueTracer, enter_block

__all__ = ["Traced", "no_autocast_cache", "trace_call"]


@dataclass(frozen=True)
class Traced:
    """The graph of one call signature.

    Attributes:
        host: Class of the host.
        graph: As the host wrote it, with a marker at the entry of each block.
        fake_mode: The mode that the values in `node.meta["val"]` belong to.
        burnt: Nodes whose value Python decided by.
        blocks: Paths of the blocks.
        markers: Stage -> marker of the tokens that enter its block.
        entries: Block -> marker, for all blocks.
        module_outputs: Module path -> node of its first output.
        modes: Module path -> `training` of each module that was traced through.
        batch_size: B.
    """

    host: str
    graph: fx.Graph
    fake_mode: FakeTensorMode
    burnt: tuple[fx.Node, ...]
    blocks: tuple[str, ...]
    markers: Mapping[int, fx.Node]
    entries: Mapping[int, fx.Node]
    module_outputs: Mapping[str, fx.Node]
    modes: Mapping[str, bool]
    batch_size: int

    def at(self, stages: Sequence[int]) -> "Traced":
        """The same trace with stages before these blocks.

        Raises:
            TraceError: Such a block takes no tensor.
        """
        markers = stage_markers(self.graph, stages)
        missing = [stages[s] for s in range(len(stages)) if s not in markers]
        if missing:
            raise TraceError(
                f"Blocks {missing} ({', '.join(self.blocks[b] for b in missing)}) take no tensor "
                f"in the forward of {self.host}, so nothing can be pruned before them."
            )
        return replace(self, markers=markers)


def trace_call(
    root: nn.Module,
    forward: Callable[..., Any],
    arguments: Mapping[str, Any],
    blocks: Sequence[str],
    stages: Sequence[int] = (),
    token_argument: int = 0,
) -> Traced:
    """Trace `forward(**arguments)`.

    Args:
        root: Holds the modules; left as it was.
        arguments: Tensors become inputs, everything else is burnt in.
        blocks: Paths of the blocks.
        stages: The block before which each stage prunes.
        token_argument: Which tensor argument of a block holds the tokens.

    Raises:
        HostError: The host itself refuses these arguments.
        TraceError: Its code cannot be traced; the line of its source is named.
    """
    tracer = ValueTracer(root, blocks, token_argument)
    try:
        graph = tracer.record(forward, arguments)
    except TokenPruneError:
        raise
    except Exception as error:
        raise _explained(error, tracer, root, arguments) from error
    if not graph.output_node().all_input_nodes:
        raise HostError(
            f"{type(root).__name__} returns no tensor for the input {_shapes(arguments)}. Wrap a "
            "model whose output is a tensor, or holds some in tuples, dicts or dataclasses."
        )
    _drop_dead(graph, tracer)
    first = next(node for node in graph.nodes if node.op == "placeholder")
    traced = Traced(
        host=type(root).__name__,
        graph=graph,
        fake_mode=tracer.fake_mode,
        burnt=tuple(tracer.burnt),
        blocks=tuple(blocks),
        markers={},
        entries=stage_markers(graph, range(len(blocks))),
        module_outputs=tracer.module_outputs,
        modes={"": root.training, **tracer.traced_modules},
        batch_size=int(first.meta["val"].shape[0]),
    )
    return traced.at(stages)


def _drop_dead(graph: fx.Graph, tracer: ValueTracer) -> None:
    """Take out what the host computes and nobody reads; what Python decided by is read."""
    read = set(tracer.burnt)
    graph.eliminate_dead_code(
        lambda node: node in read or node.target is enter_block or has_effect(node)
    )
    alive = set(graph.nodes)
    gone = [path for path, node in tracer.module_outputs.items() if node not in alive]
    for path in gone:
        del tracer.module_outputs[path]


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Autocast keeps the weights it has cast; those cast under fake tensors must not be kept."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)


def _explained(
    error: Exception, tracer: ValueTracer, root: nn.Module, arguments: Mapping[str, Any]
) -> TokenPruneError:
    shapes = _shapes(arguments)
    frame = tracer.host_frame(error)
    if isinstance(error, DataDependentOutputException):
        said = "Python asks for a value of a tensor, which differs from call to call"
    else:
        said = f"{type(error).__name__}: {error}".rstrip(" .:")
    if _refused_by_host(error):
        return HostError(
            f"{type(root).__name__} refused the input {shapes} at {frame}. It said: {said}. Give "
            "it an input that it takes by itself."
        )
    return TraceError(
        f"The forward of {type(root).__name__} cannot be traced for the input {shapes}: stopped at "
        f"{frame}. Reason: {said}."
    )


def _shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def _refused_by_host(error: Exception) -> bool:
    """A host's own check (`raise ValueError`, `assert`), rather than a limit of tracing."""
    return isinstance(error, AssertionError | ValueError) and not isinstance(
        error, NotImplementedError
    )
