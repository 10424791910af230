"""Rewritten graphs as Python functions, kept under the signature they hold for."""

import itertools
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from tokenprune.analysis.padding import about_padding, find_real
from tokenprune.analysis.plan import Plan
from tokenprune.analysis.tails import Grid, Region, find_regions, stage_grids
from tokenprune.analysis.token_probe import TokenAxes, find_token_axes
from tokenprune.errors import PlanError, UnsupportedHostError
from tokenprune.ops.jagged import gather_table_ragged, put_back_ragged
from tokenprune.reductions.bypass import BypassGather, BypassMask, BypassRagged
from tokenprune.rewrite.counts import CountRealTokens
from tokenprune.rewrite.emit import Emit
from tokenprune.rewrite.mix import MaskMixers, MaskStages
from tokenprune.rewrite.outputs import RestoreOutputs, put_back, put_back_masked
from tokenprune.rewrite.ragged import BlankPadding, PlainAttention, RaggedPolicies, RaggedStages
from tokenprune.rewrite.rewrite import Pass, Rewrite, run_passes
from tokenprune.rewrite.tables import (
    GatherAligned,
    GatherStages,
    KeepTablesWhole,
    ResizeTables,
)
from tokenprune.runtime.jagged.buckets import Bucketed
from tokenprune.tracing.host_graph import Traced

__all__ = ["PATHS", "Path", "Program", "Programs", "Route"]

Path = Literal["dense", "mask", "gather"]
PATHS: tuple[Path, ...] = ("dense", "mask", "gather")
Route = Path | Literal["ragged"]
"""`ragged` is the gather path where images keep different numbers of tokens."""

# The host's output, the stage records, the patch tokens, which patches are real (None: all).
Returned = tuple[Any, tuple[tuple[Any, ...], ...], torch.Tensor, torch.Tensor | None]

_numbers = itertools.count()


class Program:
    """One path as a function of (model, context, inputs).

    It looks modules and parameters up in the model it is given, by path: a head that was replaced
    after the trace is the one that runs, and copies of a model share their programs.
    """

    def __init__(self, rewrite: Rewrite, ragged: bool = False) -> None:
        """Make the function of a rewritten graph.

        Args:
            ragged: Images keep different numbers of tokens and leave at each stage: the graph is
                cut there and runs in buckets.
        """
        self.rewrite = rewrite
        self.run: Callable[..., Returned] = (
            Bucketed(rewrite, _function) if ragged else _function(rewrite.graph)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        return self


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the model and its placeholders; its source shows in tracebacks."""
    code = graph.python_code(root_module="self")
    file = f"<tokenprune program {next(_numbers)}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    names: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, file, "exec"), names)
    made: Callable[..., Any] = names["forward"]
    return made


@dataclass
class Programs:
    """The paths of one traced signature; each is rewritten when first asked for."""

    traced: Traced
    axes: TokenAxes
    plan: Plan
    grids: tuple[Grid, ...]
    """The tokens that each stage sees."""
    regions: Mapping[int, Region]
    """Bypass mode: block -> what dropped tokens go around there."""
    final: str
    restore: bool | None
    _made: dict[Route, Program] = field(default_factory=dict)

    @classmethod
    def analyse(
        cls,
        root: nn.Module,
        traced: Traced,
        plan: Plan,
        final: str,
        restore: bool | None,
        padding_mask: str | None = None,
    ) -> "Programs":
        """Probe a trace and keep what the passes need.

        Raises:
            PlanError: A stage sees no patch tokens; or, where tokens leave, stages see other ones.
            UnsupportedHostError: A node cannot run with fewer tokens, or `final` does not run.
        """
        grids = stage_grids(root, traced, plan)
        bypass = plan.mode == "bypass"
        if not bypass:
            _check_one_stretch(traced, plan)
        padding_mask = None if bypass else padding_mask  # no token leaves: none is chosen wrongly
        regions = find_regions(root, traced, plan, grids) if bypass else {}
        if final not in traced.module_outputs:
            raise UnsupportedHostError(
                f"Module '{final}', whose output should be the final tokens, returns no tensor in "
                "the host's forward. Pass adapter=ArchSpec(..., norm=...) with the right path."
            )
        axes = find_token_axes(
            root,
            traced.graph,
            traced.fake_mode,
            traced.burnt,
            plan.blocks,
            plan.num_prefix_tokens,
            padding=about_padding(traced, padding_mask, plan.num_prefix_tokens),
            tokens_leave=not bypass,
        )
        if padding_mask is not None:
            axes.real = find_real(traced, padding_mask, plan.num_prefix_tokens)
        return cls(traced, axes, plan, grids, regions, final, restore)

    @property
    def num_patches(self) -> tuple[int, ...]:
        """N of each stage; all the same where tokens leave."""
        return tuple(grid.num_patches for grid in self.grids)

    @property
    def batch_size(self) -> int:
        """B of the trace."""
        return self.traced.batch_size

    def get(self, root: nn.Module, path: Route) -> Program:
        """The program of `path`.

        Raises:
            UnsupportedHostError: No rewrite serves this host; the node is named.
        """
        if path not in self._made:
            rewrite = Rewrite(root, self.traced, self.axes, self.plan)
            run_passes(rewrite, self._passes(path))
            self._made[path] = Program(rewrite, path == "ragged" and self.plan.mode == "remove")
        return self._made[path]

    def _passes(self, path: Route) -> list[Pass]:
        bypass = self.plan.mode == "bypass"
        edits: Mapping[Route, list[Pass]] = {
            "dense": [],
            "mask": [BypassMask(self.grids, self.regions)]
            if bypass
            else [MaskStages(), CountRealTokens(), MaskMixers()],
            "gather": [BypassGather(self.grids, self.regions)]
            if bypass
            else [
                *(KeepTablesWhole(), GatherStages(), CountRealTokens()),
                *(ResizeTables(), GatherAligned()),
            ],
            "ragged": [BypassRagged(self.grids, self.regions)]
            if bypass
            else [
                *(KeepTablesWhole(), RaggedStages(), CountRealTokens(), ResizeTables()),
                *(MaskMixers(RaggedPolicies), GatherAligned(gather_table_ragged), PlainAttention()),
            ],
        }
        allowed = bypass or path == "dense" or self.restore is not None
        put = {"gather": put_back, "mask": put_back_masked, "ragged": put_back_ragged}
        outputs: list[Pass] = []
        if self.restore and not bypass and path != "dense":
            outputs = [RestoreOutputs(put[path])]
        elif path == "ragged" and not bypass:
            outputs = [BlankPadding()]
        emit = Emit(self.final, self.grids[-1].layout.channels_first, allowed)
        return [*edits[path], *outputs, emit]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Programs":
        return self


def _check_one_stretch(traced: Traced, plan: Plan) -> None:
    shapes = [tuple(marker.meta["val"].shape[1:]) for marker in traced.markers.values()]
    other = next((s for s, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None:
        entries = traced.entries.items()
        alike = [b for b, n in entries if tuple(n.meta["val"].shape[1:]) == shapes[0]]
        raise PlanError(
            f"Stage {other} (block {plan.blocks[other]}) sees tokens of shape {shapes[other]}, "
            f"stage 0 (block {plan.blocks[0]}) of {shapes[0]}: the host changes its grid in "
            f"between. Put all stages into one stretch, such as blocks {alike[0]} to {alike[-1]}."
        )
