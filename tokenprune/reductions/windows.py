"""Windows, for hosts that attend in windows (Swin): whole ones leave, attention and MLP both.

SparseViT (Chen et al., 2023) for any scorer. Tokens of windows that are left out keep their value.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Size, Tensor, fx, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.batch_probe import probe_batch
from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.facts import NodeFacts, TokenDim
from tokenprune.analysis.nodes import holds_no_tensor
from tokenprune.analysis.operators import argument
from tokenprune.analysis.plan import Budget
from tokenprune.analysis.tails import Sum, Tail
from tokenprune.analysis.windows import WindowBranch, WindowedBlock, windowed_blocks
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops.bypass import choose_branch
from tokenprune.ops.layout import Layout
from tokenprune.ops.windows import (
    Windows,
    leave_windows,
    put_windows,
    take_windows,
    to_windows,
    window_rows,
)
from tokenprune.reductions.protocol import MODES, Reduction
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.kept import KeptSet
from tokenprune.rewrite.kept.windows import WindowSet, windows_kept
from tokenprune.rewrite.passes import Pass
from tokenprune.rewrite.rewrite import FACTS, Rewrite
from tokenprune.rewrite.select import SelectAtSites
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.tables import GatherAligned, ResizeTables
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import quiet_trials

__all__ = ["WindowsReduction"]


@MODES.register("windows")
class WindowsReduction(Reduction):
    """Whole windows are left out of the attention and of what follows it in the block.

    A decision holds for the blocks from its stage on that attend in windows of the same grid, up to
    the next stage there.
    """

    name: ClassVar[str] = "windows"
    nested: ClassVar[bool] = False
    removes: ClassVar[bool] = False
    in_words: ClassVar[str] = "windows that matter little are left out of the blocks"
    kept_sets: ClassVar[Mapping[PathName, KeptSet]] = {
        "mask": WindowSet("mask"),
        "gather": WindowSet("gather"),
    }

    def __init__(self, root: nn.Module, analysis: Analysis) -> None:
        super().__init__(root, analysis)
        plan, blocks = analysis.plan, analysis.blocks
        given = (root, analysis.traced, blocks, plan.num_prefix, analysis.facts)
        found = windowed_blocks(*given)
        self.stage_of: dict[int, int] = {}
        for number, block in found.items():
            before = [stage for stage, start in enumerate(plan.blocks) if start <= number]
            same = [stage for stage in before if analysis.grids[stage] == block.search.grid]
            if same:
                self.stage_of[number] = same[-1]
        self.found = {number: found[number] for number in self.stage_of}
        for stage, start in enumerate(plan.blocks):
            if stage not in self.stage_of.values():
                raise _refusal(blocks, found, start)
        self.first = {}
        for number, stage in self.stage_of.items():
            self.first.setdefault(stage, self.found[number].branches[0].windows)

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        """See `Reduction.candidates`: the first block of each grid that is cut into windows."""
        with quiet_trials(), traced.fake_mode:
            facts, _ = probe_batch(root, traced)
        found = windowed_blocks(root, traced, blocks, spec.prefix, facts)
        if not found:
            raise _refusal(blocks, found, None)
        first: dict[Any, int] = {}
        for number, block in found.items():
            first.setdefault(block.search.grid, number)
        return list(first.values()), "a block that attends in windows"

    @classmethod
    def places_by_default(cls, candidates: Sequence[int]) -> list[int]:
        """All: each grid needs scores of its own."""
        return list(candidates)

    @classmethod
    def ratios(cls, keep_ratio: float, stages: int, patches: int) -> list[float]:
        """The same share of the windows of each grid."""
        return [keep_ratio] * stages

    def passes(self, path: PathName, scorer: type[Scorer], restore: bool | None) -> Sequence[Pass]:
        """See `Reduction.passes`; every token stays in the outputs."""
        shape = self.analysis.final.meta["val"].shape
        rows = max(shape[0] // self.analysis.traced.batch_size, 1)
        layout = Layout(rows, self.analysis.grids[-1].layout.channels_first and len(shape) == 4)
        emit = Emit(tokens_allowed=True, layout=layout)
        if path == "dense":
            return [emit]
        kept = WindowSet(path, self.first)
        select = SelectAtSites(kept, scorer, tokens_leave=False)
        parts = [(n, part) for n, block in self.found.items() for part in block.parts]
        if path == "mask":
            return [select, MaskWindows(kept, self.stage_of, parts), emit]
        keep = KeepWindows(kept, self.stage_of, parts)
        return [select, keep, ResizeTables(kept), GatherAligned(kept), emit]

    def tokens_in(self, budget: Budget) -> Mapping[int, int]:
        counts, found = budget.counts(self.analysis.num_patches), {}
        for number, block in self.found.items():
            stage = self.stage_of[number]
            windows, patches = block.branches[-1].windows, self.analysis.num_patches[stage]
            kept = windows_kept(counts[stage], patches, windows)
            found[number] = min(kept * windows.places, patches)
        return found


def _refusal(blocks: Blocks, found: Mapping[int, WindowedBlock], start: int | None) -> PlanError:
    """Why a stage at block `start`, or any, does nothing."""
    if found:
        return PlanError(
            f"A stage at block {start} was asked for with `mode: windows`, but no block from there "
            "to the next stage attends in more than one window of the same grid. Blocks that do: "
            f"{sorted(found)}. Put stages there."
        )
    return PlanError(
        f"`mode: windows` was asked for, but none of the {len(blocks)} blocks of this host attends "
        "in windows. Use merge-k0.7 or token-norm-k0.7 where tokens are one sequence, and "
        "`mode: bypass` where they are a grid."
    )


Parts = Sequence[tuple[int, WindowBranch | Tail]]


@dataclass
class MaskWindows(Pass):
    """All windows run; what comes of those that are left out is 0."""

    kept: WindowSet
    stage_of: Mapping[int, int]
    parts: Parts

    def apply(self, rewrite: Rewrite) -> None:
        policy: fx.Node | None = None
        for number, part in self.parts:
            stage = self.stage_of[number]
            if isinstance(part, WindowBranch):
                policy = self.kept.policy_of(rewrite, stage, part.windows)
            each = _sum_of(part)
            total, source, branch = map(rewrite.copy_of, each[:3])
            poison = rewrite.insert(total, getattr, rewrite.settings, "poison")
            how = (source, branch, policy, None, each.layout, poison)
            total.replace_input_with(branch, rewrite.insert(total, choose_branch, *how))


def _sum_of(part: WindowBranch | Tail) -> Sum:
    if isinstance(part, WindowBranch):
        return part.sum
    return Sum(part.total, part.source, part.branch, part.layout)


@dataclass
class KeepWindows(Pass):
    """Only the tokens of kept windows run."""

    kept: WindowSet
    stage_of: Mapping[int, int]
    parts: Parts

    def apply(self, rewrite: Rewrite) -> None:
        rows, windows = None, None
        for place, (number, part) in enumerate(self.parts):
            if isinstance(part, Tail):
                reads = {rewrite.copy_of(n): layout for n, layout in part.reads.items()}
                self._put(rewrite, _sum_of(part), part.inside, reads, rows, windows)
                continue
            stage, windows = self.stage_of[number], part.windows
            kept = self.kept.windows(rewrite, stage, windows)
            key = ("rows", stage, windows)
            rows = rewrite.once(key, rewrite.insert_after, kept, window_rows, kept, windows)
            self.kept.of_branch[place] = kept
            _write_sizes(rewrite, part)
            _note(rewrite, part, place)
            self._cut(rewrite, part, rows)
            self._put(rewrite, part.sum, {*part.before, *part.after}, {}, rows, windows)

    def _put(
        self,
        rewrite: Rewrite,
        each: Sum,
        inside: Iterable[fx.Node],
        reads: Mapping[fx.Node, Layout],
        rows: fx.Node,
        windows: Windows,
    ) -> None:
        """Let a branch and its sum read the tokens of kept windows, and put the sum among the
        others."""
        total, source = rewrite.copy_of(each.total), rewrite.copy_of(each.source)
        readers = {total, *map(rewrite.copy_of, inside)}
        for read, layout in {**reads, source: each.layout}.items():
            taken = rewrite.insert_after(read, take_windows, read, rows, windows, layout)
            for node in readers.intersection(read.users):
                node.replace_input_with(read, taken)
        how = (source, total, rows, windows, each.layout)
        rewrite.narrow(total, rewrite.insert_after(total, put_windows, *how), ())

    def _cut(self, rewrite: Rewrite, part: WindowBranch, rows: fx.Node) -> None:
        """Cut only kept windows out of the grid."""
        (grid, layout, made, first, _), out, windows = part.into, part.out, part.windows
        given = rewrite.copy_of(grid)
        if grid is part.sum.source:
            given = rewrite.insert_after(given, take_windows, given, rows, windows, layout)
        how = (rows, windows, layout, tuple(made.meta["val"].shape[1:]), first)
        old = rewrite.copy_of(made)
        rewrite.narrow(old, rewrite.insert_after(old, to_windows, given, *how), ())
        given, old = rewrite.copy_of(out.rows), rewrite.copy_of(out.grid)
        inner = tuple(out.grid.meta["val"].shape[1:])
        how = (rows, windows, out.channels_first, out.grid_layout, inner)
        rewrite.narrow(old, rewrite.insert_after(old, leave_windows, given, *how), ())


def _note(rewrite: Rewrite, part: WindowBranch, place: int) -> None:
    """Write down what follows the number of kept windows. Numbers that follow it are made once more
    for what runs on windows: others may read them too."""
    own: dict[fx.Node, fx.Node] = {}
    for node, facts in part.facts.items():
        copy = rewrite.copy_of(node)
        if node not in part.inside:
            if not (facts.follows_tokens or facts.length_of):
                continue
            own[node] = rewrite.again(copy, own)
            copy = own[node]
        copy.meta[FACTS] = _of_branch(facts, place)
    for node in part.inside:
        for number, again in own.items():
            rewrite.copy_of(node).replace_input_with(rewrite.copy_of(number), again)


def _of_branch(facts: NodeFacts, place: int) -> NodeFacts:
    """What a probe found of one branch, where each branch has kept windows of its own."""
    return replace(
        facts,
        dims={},
        gathers={n: how._replace(dims=_renumbered(how.dims, place)) for n, how in facts.gathers.items()},
        length_of=_renumbered(facts.length_of, place),
    )


def _renumbered(dims: Mapping[int, TokenDim], place: int) -> dict[int, TokenDim]:
    return {d: dim._replace(stage=place) for d, dim in dims.items()}


def _write_sizes(rewrite: Rewrite, part: WindowBranch) -> None:
    """What is read of tensors that hold fewer tokens now, or that nothing makes any more: their
    sizes as they were."""
    own, source = {*part.before, *part.after}, part.sum.source
    moved = {*part.before, *part.into.between, *part.out.between, part.out.grid}
    for node in moved - {source, part.out.rows}:
        for reader in node.users:
            if reader in own or not holds_no_tensor(reader.meta.get("val", node)):
                continue
            shape = node.meta["val"].shape
            read, stream = rewrite.copy_of(reader), rewrite.copy_of(source)
            ratio = (shape[0], source.meta["val"].shape[0])
            size = rewrite.insert(read, traced_shape, stream, ratio, tuple(shape[1:]))
            value = reader.meta["val"]
            if isinstance(value, Size):
                new = size
            elif reader.target == "size":
                new = rewrite.item(read, size, argument(reader, 1, "dim"))
            else:
                read.replace_input_with(rewrite.copy_of(node), stream)
                continue
            rewrite.narrow(read, new, ())


def traced_shape(stream: Tensor, ratio: tuple[int, int], inner: tuple[int, ...]) -> Size:
    """The shape that a tensor had when it was traced, for as many images as `stream` has."""
    return Size((stream.shape[0] * ratio[0] // ratio[1], *inner))
