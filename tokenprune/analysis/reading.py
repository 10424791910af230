"""How a traced host is read: which stretches are its blocks, and the facts that only a graph shows.

An adapter's facts are hints. What it names is taken as it is; what it leaves open is found here.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Self

from torch import nn

from tokenprune.analysis.blocks import Blocks, blocks_of, find_blocks, sequence_first
from tokenprune.analysis.nodes import shape_of
from tokenprune.analysis.prefix import own_at, own_tokens, refuse_inside
from tokenprune.analysis.residual import find_stretches
from tokenprune.errors import PlanError, UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.calls import ModuleCall
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["NoBlocksError", "Reading", "prefix_at", "readings", "settle"]

Mode = Literal["remove", "bypass"]


class NoBlocksError(UnsupportedHostError):
    """Nothing in this call attends."""


class Reading(NamedTuple):
    """One way to read a host.

    Attributes:
        of_graph: Blocks are those of the graph, whatever modules an adapter names.
        mode: The mode that serves; None: as the facts say.
        guessed: The facts are of the generic adapter; what the graph shows goes before them.
        runs: Path and number of the calls that are the blocks, once they are known.
    """

    of_graph: bool
    mode: Mode | None = None
    guessed: bool = False
    runs: tuple[tuple[str, int], ...] = ()

    def found(self, blocks: Blocks) -> Self:
        """This reading with its blocks: those that another call of the host has too."""
        return self._replace(runs=tuple((b.path, b.call.number) for b in blocks.values()))


def readings(hints: ArchSpec, *, guessed: bool, asked: bool, tokens_stay: bool) -> list[Reading]:
    """The ways to read a host, the likeliest first. Each is proven before it is used.

    Args:
        guessed: The facts are of the generic adapter; other ones are taken at their word.
        asked: The recipe names a mode.
        tokens_stay: In the mode that it names, every tensor keeps its size.
    """
    of_graph = not hints.blocks
    modes: tuple[Mode | None, ...] = (None,) if asked and not guessed else (None, "bypass")
    if guessed and tokens_stay:  # then blocks on any grid count
        modes = ("bypass",)
    if not guessed:
        return [Reading(of_graph, mode) for mode in modes]
    found = [Reading(graph, mode, True) for mode in modes for graph in (of_graph, True)]
    return list(dict.fromkeys(found))


def settle(
    host: nn.Module, traced: HostGraph, hints: ArchSpec, reading: Reading
) -> tuple[ArchSpec, Blocks]:
    """The facts about a host with nothing left open, and its blocks.

    Raises:
        UnsupportedHostError: No block is found.
        PlanError: Other blocks run than those of the reading.
        TraceError: As `find_blocks`.
    """
    spec = hints if reading.mode is None else replace(hints, mode=reading.mode)
    if not reading.of_graph and _are_called(host, traced, spec.blocks):
        blocks = find_blocks(host, traced, spec)
        return _with_prefix(host, traced, spec, blocks, reading), blocks
    calls = find_stretches(host, traced)
    if not calls:
        raise NoBlocksError(
            f"No transformer block is found in {traced.host}: nothing in its forward is a sum "
            "x + f(x) of tokens [B, L, D] in which f attends. Convolutional networks have no "
            "tokens to prune. If modules of it are blocks of another kind, name them: "
            "adapter=ArchSpec(blocks=('layers.0', 'layers.1'), num_prefix_tokens=0)."
        )
    named = bool(spec.blocks) and not (reading.of_graph or reading.guessed)
    if reading.runs:
        calls = _known(host, calls, reading.runs)
    elif named:
        calls = _named(host, traced, calls, spec.blocks)
    main, plain = _main(host, traced, calls)
    if reading.guessed and reading.mode is None:
        spec = replace(spec, mode="remove")
    if spec.tokens_leave and reading.mode is None and not plain:
        spec = replace(spec, mode="bypass")
    if spec.tokens_leave and not (named or reading.runs):
        calls = main
    runs = reading.runs or _runs(calls)
    spec = replace(spec, token_argument=0)  # a stretch is given its stream and nothing else
    numbers = {run: number for number, run in enumerate(runs)}
    numbered = ((numbers[call.path, call.number], call) for call in calls)
    blocks = blocks_of(host, traced, numbered, spec)
    paths = tuple(path for path, _ in runs)
    notes = (*spec.notes, f"{len(paths)} blocks found in the graph, from {paths[0] or 'the host'}")
    found = replace(spec, blocks=paths, notes=notes)
    return _with_prefix(host, traced, found, blocks, reading), blocks


def _are_called(host: nn.Module, traced: HostGraph, paths: Sequence[str]) -> bool:
    """Whether these are modules that the host calls, all or some of them; lists of modules that
    hold a block each are not."""
    own = {module: path for path, module in host.named_modules()}
    return any(own[host.get_submodule(path)] in traced.calls for path in paths)


def _named(
    host: nn.Module, traced: HostGraph, calls: Sequence[ModuleCall], paths: Sequence[str]
) -> list[ModuleCall]:
    """The blocks of the graph that are known by these paths."""
    wanted = Counter(paths)
    found = [call for call in calls if wanted[call.path] > call.number]
    missing = set(paths) - {call.path for call in found}
    if missing:
        known = tuple(dict.fromkeys(call.path for call in calls))
        advice = f"Its blocks are: adapter=ArchSpec(blocks={known!r})."
        if _are_called(host, traced, known):  # then a name would be taken for that module alone
            advice = (
                f"Its blocks begin in {list(known)}, which are more than these modules, so they "
                "cannot be named. Leave `blocks` out, and they are found: adapter=ArchSpec()."
            )
        raise UnsupportedHostError(
            f"The blocks {sorted(missing)} were named, but no module at these paths is called in "
            f"the forward of {type(host).__name__}, and the graph has no block of that name. "
            f"{advice}"
        )
    return found


def _known(
    host: nn.Module, calls: Sequence[ModuleCall], runs: Sequence[tuple[str, int]]
) -> list[ModuleCall]:
    """The blocks that were found before, whatever else this call runs; a method of the host may run
    some of them only."""
    found = [call for call in calls if (call.path, call.number) in runs]
    if not found:
        before, now = (sorted({path for path, _ in paths}) for paths in (runs, _runs(calls)))
        raise PlanError(
            f"This call of {type(host).__name__} runs other blocks, {now}, than those that were "
            f"found when it was wrapped, {before}. Unwrap it, and wrap it again as it is now."
        )
    return found


def _runs(calls: Sequence[ModuleCall]) -> list[tuple[str, int]]:
    return [(call.path, call.number) for call in calls]


def _main(
    host: nn.Module, traced: HostGraph, calls: Sequence[ModuleCall]
) -> tuple[list[ModuleCall], bool]:
    """The largest group of blocks that one sequence [B, L, D] or [L, B, D] goes through; and
    whether tokens can leave there: it is most of the host."""
    shapes = Counter(_entering(call) for call in calls)
    entries = {_entering(call): call.inputs[0] for call in calls}
    plain = {
        shape: shapes[shape]
        for shape, entry in entries.items()
        if len(shape) == 3 and entry is not None
        if shape[0] == traced.batch_size or sequence_first(host, traced, entry)
    }
    if not plain:
        return list(calls), False
    most = max(plain, key=lambda shape: (plain[shape], max(shape[:2])))
    main = [call for call in calls if _entering(call) == most]
    return main, 2 * len(main) > len(calls)


def _entering(call: ModuleCall) -> tuple[int, ...]:
    (entry,) = call.inputs
    return () if entry is None else shape_of(entry)


def _with_prefix(
    host: nn.Module, traced: HostGraph, spec: ArchSpec, blocks: Blocks, reading: Reading
) -> ArchSpec:
    """The facts with the prefix tokens that the graph shows, unless somebody stated them.

    Raises:
        UnsupportedHostError: Own tokens of the host are among the patches, and could leave.
    """
    if spec.num_prefix_tokens is not None and not reading.guessed:
        return spec
    own = own_tokens(host, traced, blocks[min(blocks)].entry) if blocks else None
    if own is None:
        how = f"{spec.prefix} prefix tokens: nothing else tells which are of the image"
        return replace(spec, num_prefix_tokens=spec.prefix, notes=(*spec.notes, how))
    if spec.tokens_leave:
        refuse_inside(traced, own)
    front, end, _ = own
    how = f"{front} prefix tokens: they are the same for every image"
    how += f"; so are the last {end}, which always stay" if end else ""
    notes = (*spec.notes, how)
    return replace(spec, num_prefix_tokens=front, num_suffix_tokens=end, notes=notes)


def prefix_at(
    host: nn.Module,
    traced: HostGraph,
    spec: ArchSpec,
    blocks: Blocks,
    reading: Reading,
    staged: Sequence[int],
) -> ArchSpec:
    """The facts of a host that keeps a grid, with its own tokens on the grids on which the stages
    at blocks `staged` let tokens leave.

    Raises:
        PlanError: These grids have different ones.
    """
    if spec.tokens_leave or not reading.guessed:
        return spec
    known = own_at(host, traced, blocks, [n for n in staged if n in blocks])
    if len(set(known.values())) > 1:
        counts = " or ".join(f"{own.front} + {own.end}" for own in known.values())
        raise PlanError(
            f"Tokens are to leave at blocks {list(known)}, where {counts} tokens of {traced.host} "
            "at the front and at the end are no patches (class tokens). Put all stages at blocks "
            "with the same number of them."
        )
    for own in known.values():
        return replace(spec, num_prefix_tokens=own.front, num_suffix_tokens=own.end)
    return spec
