"""Windows, for hosts that attend in windows (Swin): whole ones leave, attention and MLP both.

SparseViT (Chen et al., 2023) for any scorer. Tokens of windows that are left out keep their value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Size, Tensor, fx, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.batch_probe import probe_batch
from tokenprune.analysis.blocks import Blocks, site_marker
from tokenprune.analysis.facts import NodeFacts, TokenDim
from tokenprune.analysis.nodes import holds_no_tensor
from tokenprune.analysis.operators import argument
from tokenprune.analysis.plan import Budget
from tokenprune.analysis.windows import Part, WindowBranch, WindowedBlock, windowed_blocks
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops.bypass import choose_branch
from tokenprune.ops.layout import Layout
from tokenprune.ops.windows import (
    Windows,
    leave_windows,
    put_windows,
    relaid_windows,
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
from tokenprune.tracing.effects import has_effect
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
            same = [stage for stage in before if analysis.grids[stage] == block.grid]
            if same:
                self.stage_of[number] = same[-1]
        self.found = {number: found[number] for number in self.stage_of}
        for stage, start in enumerate(plan.blocks):
            if stage not in self.stage_of.values():
                raise _refusal(blocks, found, start)
        self.first: dict[int, Windows] = {}
        for number, stage in self.stage_of.items():
            self.first.setdefault(stage, self.found[number].windows[0])

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        """See `Reduction.candidates`: the first block of each grid that is cut into windows, except
        the host's first block: no token that enters it has seen another, and all norms are equal
        after a norm layer."""
        first: dict[Any, int] = {}
        for number, block in _after_first(root, traced, blocks, spec).items():
            first.setdefault(block.grid, number)
        return list(first.values()), "a block after the first that attends in windows"

    @classmethod
    def at_every_block(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> Sequence[int]:
        """Those that attend in windows, except the host's first block as well."""
        return list(_after_first(root, traced, blocks, spec))

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
        emit = Emit(tokens_allowed=True, layout=self.final_layout)
        if path == "dense":
            return [emit]
        kept = WindowSet(path, self.first)
        select = SelectAtSites(kept, scorer, tokens_leave=False)
        found = ((self.stage_of[number], block) for number, block in self.found.items())
        parts = [(stage, part) for stage, block in found for part in block.parts]
        if path == "mask":
            return [select, MaskWindows(kept, parts), emit]
        keep = KeepWindows(kept, parts)
        return [select, keep, ResizeTables(kept), GatherAligned(kept), emit]

    def tokens_in(self, budget: Budget) -> Mapping[int, int]:
        counts, found = budget.counts(self.analysis.num_patches), {}
        for number, block in self.found.items():
            stage = self.stage_of[number]
            windows, patches = block.windows[-1], self.analysis.num_patches[stage]
            kept = windows_kept(counts[stage], patches, windows)
            found[number] = min(kept * windows.places, patches)
        return found


def _after_first(
    root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
) -> dict[int, WindowedBlock]:
    """The blocks that attend in windows, except the host's first block; PlanError if none does."""
    with quiet_trials(), torch.no_grad(), traced.fake_mode:
        facts, _ = probe_batch(root, traced)
    found = windowed_blocks(root, traced, blocks, spec.prefix, facts)
    if not found:
        raise _refusal(blocks, found, None)
    return {number: block for number, block in found.items() if number != min(blocks)}


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


Parts = Sequence[tuple[int, Part]]
"""The parts of all blocks that a stage decides for, each with the number of that stage."""


@dataclass
class MaskWindows(Pass):
    """All windows run; what comes of those that are left out is 0."""

    kept: WindowSet
    parts: Parts

    def apply(self, rewrite: Rewrite) -> None:
        policy: fx.Node | None = None
        for stage, part in self.parts:
            if part.attention is not None:
                policy = self.kept.policy_of(rewrite, stage, part.attention.windows)
            total, source, branch = map(rewrite.copy_of, part.sum[:3])
            poison = rewrite.insert(total, getattr, rewrite.settings, "poison")
            how = (source, branch, policy, None, part.sum.layout, poison)
            total.replace_input_with(branch, rewrite.insert(total, choose_branch, *how))


class _Kept(NamedTuple):
    """The sum of the part before, where only tokens of kept windows have run.

    Attributes:
        tokens: Theirs.
        layout: As it would hold all tokens.
        whole: What they are put into.
        whole_layout: How that holds them.
    """

    tokens: fx.Node
    layout: Layout
    whole: fx.Node
    whole_layout: Layout


@dataclass
class KeepWindows(Pass):
    """Only the tokens of kept windows run."""

    kept: WindowSet
    parts: Parts

    def apply(self, rewrite: Rewrite) -> None:
        before: _Kept | None = None
        cut: tuple[fx.Node, Windows]
        for place, (stage, part) in enumerate(self.parts):
            if part.attention is not None:
                windows = part.attention.windows
                kept = self.kept.windows(rewrite, stage, windows)
                how = (("rows", stage, windows), rewrite.insert_after, kept, window_rows)
                cut = rewrite.once(*how, kept, windows), windows
                self.kept.of_branch[place] = kept
                _write_sizes(rewrite, part.attention)
                _note(rewrite, part.attention, place)
                self._cut(rewrite, part.attention, cut[0])
                before = None
            before = self._put(rewrite, part, *cut, before)
        read = _read_nodes(rewrite)
        order = {node: place for place, node in enumerate(rewrite.graph.nodes) if node in read}
        final = rewrite.copy_of(rewrite.analysis.final)
        for node in rewrite.graph.find_nodes(op="call_function", target=put_windows):
            if node in read:
                node.update_arg(7, _is_owned(node, order, final))

    def _put(
        self,
        rewrite: Rewrite,
        part: Part,
        rows: fx.Node,
        windows: Windows,
        before: _Kept | None,
    ) -> _Kept:
        """Let a branch and its sum read the tokens of kept windows, and put the sum among the
        others; the sum `before`, of the same windows, is not taken out again."""
        total, source = rewrite.copy_of(part.sum.total), rewrite.copy_of(part.sum.source)
        readers = {total, *map(rewrite.copy_of, part.inside)}
        whole = (source, part.sum.layout)
        for origin, layout in part.reads.items():
            read = rewrite.copy_of(origin)
            if before is not None and origin in part.same:
                given = (before.tokens, rows, before.layout, layout, _inner(origin))
                taken = rewrite.insert_after(read, relaid_windows, *given)
                whole = before[2:] if read is source else whole
            else:
                taken = _taken(rewrite, read, rows, windows, layout)
            for node in readers.intersection(read.users):
                node.replace_input_with(read, taken)
        (grid, was), layout = whole, part.sum.layout
        to = (rows, windows, was, layout, _inner(part.sum.total), False)
        rewrite.narrow(total, rewrite.insert_after(total, put_windows, grid, total, *to), ())
        return _Kept(total, layout, *whole)

    def _cut(self, rewrite: Rewrite, part: WindowBranch, rows: fx.Node) -> None:
        """Cut only kept windows out of the grid."""
        (grid, layout, made, first, _), out, windows = part.into, part.out, part.windows
        given = rewrite.copy_of(grid)
        if grid is part.sum.source:
            given = _taken(rewrite, given, rows, windows, layout)
        how = (rows, windows, layout, _inner(made), first)
        old = rewrite.copy_of(made)
        rewrite.narrow(old, rewrite.insert_after(old, to_windows, given, *how), ())
        given, old = rewrite.copy_of(out.rows), rewrite.copy_of(out.grid)
        to = (rows, windows, out.channels_first, out.grid_layout, _inner(out.grid))
        rewrite.narrow(old, rewrite.insert_after(old, leave_windows, given, *to), ())


def _taken(
    rewrite: Rewrite, read: fx.Node, rows: fx.Node, windows: Windows, layout: Layout
) -> fx.Node:
    """The tokens of kept windows of a node."""
    how = (take_windows, read, rows, windows, layout)
    return rewrite.once(("taken", *how), rewrite.insert_after, read, *how)


def _inner(node: fx.Node) -> tuple[int, ...]:
    """All dims of a traced tensor but the first."""
    return tuple(node.meta["val"].shape[1:])


VIEWS = ("view", "reshape", "flatten", "unflatten", site_marker)


def _read_nodes(rewrite: Rewrite) -> set[fx.Node]:
    """The nodes that anything depends on."""
    final = rewrite.copy_of(rewrite.analysis.final)
    queue = [n for n in rewrite.graph.nodes if has_effect(n) or n in (rewrite.output, final)]
    found = set(queue)
    for node in queue:
        fresh = [used for used in node.all_input_nodes if used not in found]
        found.update(fresh)
        queue += fresh
    return found


def _is_owned(put: fx.Node, order: Mapping[fx.Node, int], final: fx.Node) -> bool:
    """Whether what tokens are put into was made by us, and nobody reads it later."""
    made = put.args[0]
    while isinstance(made, fx.Node) and made.target in VIEWS:
        made = made.all_input_nodes[0]
    if not isinstance(made, fx.Node) or made.target is not put_windows:
        return False
    same = [made]
    for node in same:
        for user in node.users:
            number = "val" in user.meta and holds_no_tensor(user.meta["val"])
            if user not in order or user is put or number or user.target is traced_shape:
                continue  # nothing depends on it, or it reads no more than a size
            if order[user] > order[put] or user.target not in (take_windows, *VIEWS):
                return False
            same += [user] if user.target in VIEWS else []
    return final not in same


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
        gathers={
            n: how._replace(dims=_renumbered(how.dims, place)) for n, how in facts.gathers.items()
        },
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
            value = reader.meta.get("val")  # None: of a hook, which sees what runs
            if reader in own or value is None or not holds_no_tensor(value):
                continue
            shape = node.meta["val"].shape
            read, stream = rewrite.copy_of(reader), rewrite.copy_of(source)
            ratio = (shape[0], source.meta["val"].shape[0])
            size = rewrite.insert(read, traced_shape, stream, ratio, tuple(shape[1:]))
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
