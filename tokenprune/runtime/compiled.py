"""A wrapped model inside of torch.compile: what is compiled holds as long as a program's guards do.

Dynamo compares what it takes for a constant with what it saw, before each call, by `==`; for that
it takes classes that are registered as constants. An equal object is one whose program still holds.
"""

from typing import Any

import torch

from tokenprune.errors import HostError, TokenPruneError
from tokenprune.hosts.inputs import CallSignature
from tokenprune.private import jit_tracing, register_constant
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.cache import ProgramCache
from tokenprune.runtime.program import Programs
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.modes import modes_hold

__all__ = ["HANDS_ON", "Handle", "Seen", "prepare", "refuse_jit_trace", "watched_by_dynamo"]


# Dynamo of torch 2.8 compares an object by `==` only if a function gets it as a constant; that of
# torch 2.14 compares such an object by its identity. Torch 2.11 compares by `==` in both cases.
_HANDED_ON = torch.__version__ < "2.11"


HANDS_ON = "labels go to a loss that runs for real"


class Handle:
    """A `Pruning` as an argument that Dynamo takes for a constant (torch 2.11 and earlier take no
    other objects); the same one only if it is the same object."""

    def __init__(self, pruning: Any) -> None:
        self.pruning = pruning

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class Seen:
    """The programs that a call was compiled with; of none, what is compared with it later; or
    (`refused`) that there were none to compile, which is tried again in each call."""

    def __init__(
        self,
        programs: Programs | None = None,
        cache: ProgramCache | None = None,
        refused: bool = False,
    ) -> None:
        self.programs, self.cache, self.refused = programs, cache, refused

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Seen) or self.refused or other.refused:
            return False
        one = self if other.programs is None else other
        if one.programs is None or one.cache is None:
            return True
        ambient = one.programs.analysis.traced.ambient
        return modes_hold(ambient) and one.cache.holds(one.programs)

    def __hash__(self) -> int:
        return 0  # any two may be equal

    def __reduce__(self) -> tuple[type["Seen"], tuple[()]]:
        return Seen, ()  # a copy has programs of its own


register_constant(Handle)
register_constant(Seen)


def refuse_jit_trace(host: str) -> None:
    """Raise if torch.jit.trace runs."""
    if jit_tracing():
        raise HostError(
            f"torch.jit.trace (or the old torch.onnx exporter) was run on a {host} that tokenprune "
            "wrapped: its forward chooses a program by shapes and modes, which such a trace would "
            'freeze in silence. Call tokenprune.export(model, "model.onnx") or '
            'tokenprune.export(model, "model.pt2").'
        )


def watched_by_dynamo(pruning: Any) -> None:
    """Make Dynamo compare `seen` before each call. It compares other objects only, so another one
    is put in its place, which what is compiled does as well."""
    used = _used(pruning.seen) if _HANDED_ON else pruning.seen is not None
    if used:  # Dynamo looks at nothing that is not used
        pruning.seen = pruning.spare


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _used(seen: Seen) -> bool:
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def prepare(
    handle: Handle, path: Path, entry: str, places: Any, names: tuple[str, ...], *values: Any
) -> int | str:
    """Build the program before Dynamo traces the call, on real tensors and outside of what is
    compiled; its number, or why it cannot be: an error that is raised here Dynamo would wrap."""
    pruning, arguments = handle.pruning, Arguments(dict(zip(names, values, strict=True)), places)
    try:
        return _prepared(pruning, path, entry, arguments)
    except TokenPruneError as error:
        pruning.seen = Seen(refused=True)
        return f"{type(error).__name__}: {error}"


def _prepared(pruning: Any, path: Path, entry: str, arguments: Arguments) -> int | str:
    if (now := CallSignature.now(type(pruning.host))) != pruning.call:
        pruning.call = now
        raise HostError(
            f"The forward of {now.host}, which takes ({', '.join(now.names)}), was put in the "
            "place of one with other arguments after torch.compile. Call the model again."
        )
    programs = pruning.programs(arguments, entry)
    pruning.prove(programs, pruning.handing(arguments, entry))
    for whole in {False, programs.unread_rows}:  # the latter for calls that return a trace
        programs.get(pruning.host, path, whole)
    pruning.look_at_scorers(path)
    if pruning.handing(arguments, entry).handed:
        pruning.seen = Seen(refused=True)
        return HANDS_ON
    pruning.seen = Seen(programs, pruning.cache)
    number: int = programs.number
    return number
