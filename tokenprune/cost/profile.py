"""Count multiply-accumulates exactly, on any device, without doing the arithmetic.

The program that would run is interpreted on meta tensors, node by node, and operators are counted
by torch's formulas. What counts is what runs: fused attention included, predictors included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tokenprune.analysis.plan import Budget
from tokenprune.cost.flops import Counted, count_macs
from tokenprune.cost.remembered import Remembered
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.rewrite.settings import SETTINGS
from tokenprune.runtime.model import pruning_of
from tokenprune.runtime.program import Programs
from tokenprune.tracing.guards import Guards
from tokenprune.tracing.state import in_mode

__all__ = ["Profile", "Profiler", "profile"]


@dataclass(frozen=True)
class Profile:
    """Multiply-accumulates (MACs) and tokens of one image.

    Attributes:
        host: Class of the host.
        mode: The recipe's: what becomes of the other tokens.
        num_patches: N at the first stage.
        patches_per_stage: N of each stage; all the same where tokens leave.
        num_prefix_tokens: P; the blocks process these beside the patch tokens.
        stages: The block of each stage.
        blocks: Module paths of the blocks.
        tokens_per_block: Patch tokens that enter each block; in bypass mode, those that go through
            its MLP.
        macs_per_block: MACs of each block, without the predictor before it.
        dense_macs_per_block: The same for the host without pruning.
        predictor_macs: MACs of the predictor of each stage.
        macs: All of the pruned eval path: blocks, predictors, embedding, head.
        dense_macs: All of the host without pruning.
        description: Of the recipe; what `auto` chose, and why.
        starts: The stages that choose among all tokens; others among those that are left.
    """

    host: str
    mode: str
    num_patches: int
    patches_per_stage: tuple[int, ...]
    num_prefix_tokens: int
    stages: tuple[int, ...]
    blocks: tuple[str, ...]
    tokens_per_block: tuple[int, ...]
    macs_per_block: tuple[int, ...]
    dense_macs_per_block: tuple[int, ...]
    predictor_macs: tuple[int, ...]
    macs: int
    dense_macs: int
    description: str = ""
    starts: tuple[int, ...] = (0,)

    @property
    def gmacs(self) -> float:
        """10^9 MACs of the path that eval runs."""
        return self.macs / 1e9

    @property
    def dense_gmacs(self) -> float:
        """10^9 MACs of the host without pruning."""
        return self.dense_macs / 1e9

    @property
    def ratio(self) -> float:
        """MACs relative to the dense host; below 1 if pruning saves any."""
        return self.macs / self.dense_macs

    @property
    def predictor_share(self) -> float:
        """Share of the predictors in all MACs."""
        return sum(self.predictor_macs) / self.macs

    @property
    def other_macs(self) -> int:
        """MACs outside of blocks and predictors: embedding, head."""
        return self.macs - sum(self.macs_per_block) - sum(self.predictor_macs)

    def __str__(self) -> str:
        lines = [
            f"{self.host}: {self.gmacs:.4g} GMACs, dense {self.dense_gmacs:.4g} "
            f"({100 * (self.ratio - 1):+.1f} %), predictors {100 * self.predictor_share:.1f} %",
            f"{'block':<24}{'tokens':>8}{'MMACs':>12}{'dense':>12}",
        ]
        predictors = dict(zip(self.stages, self.predictor_macs, strict=True))
        columns = (self.blocks, self.tokens_per_block, self.macs_per_block)
        rows = zip(*columns, self.dense_macs_per_block, strict=True)
        for block, (path, tokens, macs, dense) in enumerate(rows):
            if block in predictors:
                before = f"predictor {self.stages.index(block)}"
                lines.append(f"{before:<32}{predictors[block] / 1e6:>12.3f}")
            lines.append(f"{path:<24}{tokens:>8}{macs / 1e6:>12.3f}{dense / 1e6:>12.3f}")
        lines.append(f"{'embedding, head':<32}{self.other_macs / 1e6:>12.3f}")
        lines += [self.description] if self.description else []
        return "\n".join(lines)


def profile(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, budget: Budget | None = None
) -> Profile:
    """Count what a wrapped model costs in eval, per image.

    Nothing is computed and no weight is read, so random weights and big hosts are fine. With every
    keep_ratio at 1 the host itself runs, and that is what is counted. With a threshold images cost
    different amounts: this counts one that keeps as many tokens as the keep ratios say, and
    `ImageMacs` what given images cost.

    Args:
        model: What `wrap` returned.
        example_inputs: As for `wrap`; what the model was wrapped with if None.
        budget: How much the stages keep; the model's own if None.

    Raises:
        NotWrappedError: `model` is not wrapped.
        HostError: The inputs hold no tensor, or the host refuses them.
    """
    return Profiler(model, example_inputs)(budget)


class Profiler:
    """Counts what several budgets of one wrapped model cost, as `profile` does."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> None:
        self.model, self.example_inputs = model, example_inputs
        self._remembered = Remembered()

    def __call__(self, budget: Budget | None = None) -> Profile:
        """Count one; the model's own if None."""
        return _profile(self.model, self.example_inputs, budget, self._remembered)


def _profile(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    budget: Budget | None,
    remembered: Remembered,
) -> Profile:
    pruning = pruning_of(model)
    budget = budget or pruning.budget
    with in_mode(model, training=False):
        programs = _programs(model, example_inputs)
    spec, plan, analysis = pruning.spec, pruning.plan, programs.analysis
    batch = analysis.traced.batch_size if analysis.batch_bound else 1
    inputs = _meta_inputs(programs, batch)
    dense = _dense(model, programs, inputs)
    pruned = dense
    if min(budget.keep_ratios) < 1.0 or not programs.reduction.prunes:
        rewrite = programs.get(model, "gather").rewrite
        entries = {n: rewrite.copy_of(block.entry) for n, block in analysis.blocks.items()}
        settings = remembered.settings(budget.counts(programs.num_patches))
        inputs = {**inputs, SETTINGS: settings}
        pruned = count_macs(model, analysis, rewrite.graph, entries, inputs, remembered)
    numbers = range(len(spec.blocks))
    tokens = {**pruned.tokens, **programs.reduction.tokens_in(budget)}
    stages = range(len(plan.sites))
    return Profile(
        host=type(model).__name__,
        mode=pruning.method.reduction.name,
        num_patches=programs.num_patches[0],
        patches_per_stage=programs.num_patches,
        num_prefix_tokens=plan.num_prefix,
        stages=plan.blocks,
        blocks=spec.blocks,
        tokens_per_block=tuple(tokens.get(b, 0) for b in numbers),
        macs_per_block=tuple(pruned.macs["block", b] // batch for b in numbers),
        dense_macs_per_block=tuple(dense.macs["block", b] // batch for b in numbers),
        predictor_macs=tuple(pruned.macs["predictor", stage] // batch for stage in stages),
        macs=pruned.macs.total() // batch,
        dense_macs=dense.macs.total() // batch,
        description=pruning.recipe.description,
        starts=tuple(sorted(programs.starts)),
    )


def _programs(model: nn.Module, example_inputs: ExampleInputs | None) -> Programs:
    pruning = pruning_of(model)
    if example_inputs is None:
        return pruning.programs(pruning.as_wrapped())
    return pruning.programs(pruning.inputs(example_inputs))


# By trace, then by what is counted as a block, and the names and shapes of the weights: a head may
# be replaced.
_dense_counts: WeakKeyDictionary[Guards, dict[Any, Counted]] = WeakKeyDictionary()


def _dense(model: nn.Module, programs: Programs, inputs: Mapping[str, Any]) -> Counted:
    """The count of the host without pruning, made once for a trace and shapes of weights."""
    analysis, graph = programs.analysis, programs.analysis.traced.graph
    shapes = tuple((name, tuple(p.shape)) for name, p in pruning_of(model).host.named_parameters())
    blocks = tuple((number, block.path) for number, block in analysis.blocks.items())
    key = shapes, blocks, analysis.plan.num_prefix
    known = _dense_counts.setdefault(programs.guards, {})
    if key not in known:
        entries = {number: block.entry for number, block in analysis.blocks.items()}
        known[key] = count_macs(model, analysis, graph, entries, inputs)
    return known[key]


def _traced_inputs(programs: Programs) -> dict[str, torch.Tensor]:
    return {n: node.meta["val"] for n, node in programs.analysis.traced.inputs.items()}


def _meta_inputs(programs: Programs, batch: int) -> dict[str, Any]:
    """Meta tensors like those of the trace, for `batch` images."""
    made, traced = {}, programs.analysis.traced
    for name, like in _traced_inputs(programs).items():
        batched = like.ndim and like.shape[0] == traced.batch_size
        shape = (batch, *like.shape[1:]) if batched else tuple(like.shape)
        made[name] = torch.empty(shape, dtype=like.dtype, device="meta")
    return made
