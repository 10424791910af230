"""The host's other methods that run its blocks: `forward_features`, `get_image_features`, ...

Which do is not known before: a method is tried on the wrapped model, and stops where it would run
a block that prunes. What stops has a program of its own.
"""

import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import takewhile
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from tokenprune.analysis.operators import mixes
from tokenprune.errors import HostError
from tokenprune.runtime.program import Programs
from tokenprune.tracing.state import Passing

__all__ = [
    "BlocksReached",
    "added_later",
    "are_stopped",
    "called_in",
    "check_what_follows",
    "methods_of",
    "run_in",
    "stopped_at",
    "stopping",
]


class BlocksReached(BaseException):
    """A method of a wrapped model is about to run blocks. No host is to catch it."""


def methods_of(host_class: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods that a host's classes define beside those that every module has."""
    classes = host_class.__mro__[: host_class.__mro__.index(nn.Module)]
    found = {name: value for cls in reversed(classes) for name, value in dict(vars(cls)).items()}
    of_all = dir(nn.Module)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, FunctionType) and name[:2] != "__" and name not in of_all
    }


def added_later(host_class: Any, known: Any) -> dict[CodeType, str]:
    """The methods of a host's classes that the class of its wrapped models does not know, by their
    code: they were added after `wrap`."""
    bases = host_class.__mro__[: host_class.__mro__.index(nn.Module)]
    return _added_later(host_class, known, sum(len(vars(base)) for base in bases))


@lru_cache(maxsize=64)
def _added_later(host_class: Any, known: Any, _size: int) -> dict[CodeType, str]:
    later = {n: m.__code__ for n, m in methods_of(host_class).items() if n not in vars(known)}
    inside = {
        n: [c for c in code.co_consts if isinstance(c, CodeType)] for n, code in later.items()
    }
    return {code: name for name, own in later.items() for code in (own, *inside[name])}


def called_in(host: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The modules by which blocks are known; those inside of one that is a mere list of them.

    Blocks that somebody has cut away are left out: no method calls them.
    """
    there = dict(host.named_modules(remove_duplicate=False))
    return [m for path in paths if path in there for m in _called(there[path])]


def _called(block: nn.Module) -> list[nn.Module]:
    if not isinstance(block, nn.ModuleList | nn.ModuleDict):
        return [block]
    return [m for child in block.children() for m in _called(child)]


def run_in(host: nn.Module, whole: Programs, blocks: Sequence[int]) -> list[nn.Module]:
    """The modules that a method calls if it runs one of these blocks of the host's own code: those
    that run inside of them, and not before the first block; all children, if there are none."""
    analysis = whole.analysis
    inside = {m for number in blocks for m in _modules(analysis.blocks[number].call.nodes())}
    entries = {block.entry for block in analysis.blocks.values()}
    before = _modules(takewhile(lambda n: n not in entries, analysis.traced.graph.nodes))
    paths = sorted(inside - set(before) - {""})
    if paths:
        return [host.get_submodule(path) for path in paths]
    return [m for child in host.children() for m in _called(child)]


def _modules(nodes: Iterable[fx.Node]) -> Iterator[str]:
    return (node.meta["where"].module for node in nodes if "where" in node.meta)


@contextmanager
def stopped_at(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Raise `BlocksReached` where this thread calls one of `blocks`."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_stopped_at(block))
        yield


def are_stopped(blocks: Iterable[nn.Module]) -> bool:
    """Whether this thread is to stop where it calls one of `blocks`."""
    stops = (vars(block).get("forward") for block in blocks)
    return any(isinstance(s, _Stop) and s.threads[threading.get_ident()] for s in stops)


def stopping(
    generator: Iterator[Any], blocks: Sequence[nn.Module], name: str
) -> Generator[Any, None, Any]:
    """What a method named `name` yields, as long as it runs none of `blocks`.

    Raises:
        HostError: It does, so it would run dense.
    """
    while True:
        try:
            with stopped_at(blocks):
                value = next(generator)
        except StopIteration as stop:
            return stop.value
        except BlocksReached:
            raise HostError(
                f"{name}() of a wrapped model yields between the host's blocks, so nothing could "
                "be pruned. Give the host a method that returns what it yields, or run it dense: "
                "model.using('dense')."
            ) from None
        yield value


class _Stop(Passing):
    """The forward of a block while some threads are to stop there."""

    def __init__(self, block: nn.Module) -> None:
        self.before, self.run = vars(block).get("forward"), block.forward
        self.threads = Counter[int]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.threads[threading.get_ident()]:
            raise BlocksReached
        return self.run(*args, **kwargs)


_CHANGING = threading.Lock()


@contextmanager
def _stopped_at(block: nn.Module) -> Iterator[None]:
    own, thread = vars(block), threading.get_ident()
    with _CHANGING:
        there = own.get("forward")
        stop = there if isinstance(there, _Stop) else _Stop(block)
        own["forward"] = stop
        stop.threads[thread] += 1
    try:
        yield
    finally:
        with _CHANGING:
            stop.threads[thread] -= 1
            if not any(stop.threads.values()) and own.get("forward") is stop:
                own.pop("forward")
                if stop.before is not None:
                    own["forward"] = stop.before


def check_what_follows(root: nn.Module, whole: Programs, name: str) -> None:
    """Refuse a method whose result the rest of the forward cannot read without the policy.

    Args:
        whole: Programs of the forward.
        name: Of the method.

    Raises:
        HostError: After the last block the forward takes a mean over tokens, say, which in training
            must leave out dropped ones.
    """
    analysis = whole.analysis
    last = analysis.blocks[max(analysis.blocks)].call.last
    node = last.next if last is not None else analysis.final.next
    while node.op != "output":
        if mixes(root, node) and any(analysis.facts[n].dims for n in node.all_input_nodes):
            raise HostError(
                f"Asked for {name}() of a wrapped {analysis.traced.host} in training, where "
                f"dropped tokens are still among the tokens it returns; what its forward does with "
                f"them afterwards, at {node.meta['where']}, has to leave them out. Call the model "
                "itself, or model.eval() with restore=False."
            )
        node = node.next
