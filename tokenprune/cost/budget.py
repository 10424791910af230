"""Find the budget whose cost is a share of the dense host's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tokenprune.analysis.plan import Budget
from tokenprune.cost.image_macs import ImageMacs
from tokenprune.cost.profile import Profiler
from tokenprune.errors import PlanError
from tokenprune.hosts.batches import Batches, BatchSource
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.tracing.state import in_mode

__all__ = ["budget_for", "check_possible", "check_share", "threshold_for"]

STEPS = 40
"""Halvings of an interval: more than a float of 32 bits can tell apart."""
SATURATED = 15.0
"""The logit of a probability that 32 bits tell from 1, just about."""
CLOSE = 0.01
"""Of the dense MACs: a budget that is met within this is met."""


def budget_for(
    model: PrunedModel, macs: float, example_inputs: ExampleInputs | None = None
) -> tuple[Budget, float]:
    """The keep ratios whose MACs are nearest to `macs` of the dense host's, and their share.

    Ratios that were r, r^2, r^3, ... stay so. Others keep the form in which tokens leave: as many
    in every block (ToMe's r), or fewer from block to block. With every token kept the host itself
    runs, without predictors.

    Args:
        macs: In (0, 1].
        example_inputs: As for `wrap`; what the model was wrapped with if None.

    Raises:
        PlanError: No budget is that small.
    """
    check_share(macs)
    pruning = pruning_of(model)
    pruning.method.check_prunes(f"macs={macs:g}")
    shape = _shape([stage.keep_ratio for stage in pruning.recipe.resolved_stages])
    profiler = Profiler(model, example_inputs)
    patches = profiler().patches_per_stage
    costs: dict[tuple[int, ...], float] = {}

    def at(amount: float) -> tuple[Budget, float]:
        budget = replace(pruning.budget, keep_ratios=shape(amount), threshold=None)
        counts = budget.counts(patches)
        if counts not in costs:
            costs[counts] = profiler(budget).ratio
        return budget, costs[counts]

    if macs == 1.0:
        return at(0.0)
    low, high = 0.0, 1.0
    check_possible(macs, at(high)[1], pruning.plan.blocks)
    for step in range(STEPS):
        ends, middle = (at(low)[1], at(high)[1]), (low + high) / 2
        if step % 2 and ends[0] > macs > ends[1]:  # where a straight line meets it
            middle = low + (high - low) * (ends[0] - macs) / (ends[0] - ends[1])
        found = at(middle)[1]
        if abs(found - macs) < CLOSE / 10 or high - low < 1e-6:
            break
        low, high = (middle, high) if found > macs else (low, middle)
    return min((at(x) for x in (low, middle, high)), key=lambda pair: abs(pair[1] - macs))


def _shape(ratios: Sequence[float]) -> Callable[[float], tuple[float, ...]]:
    """Amount from 0 (all tokens stay) to 1 (all leave at the first stage) -> ratios of this
    form."""
    first = ratios[0]
    powers = all(abs(r - first ** (s + 1)) < 1e-3 for s, r in enumerate(ratios))
    if powers or first == 1.0:
        return lambda amount: tuple(max(1 - amount, 1e-6) ** (s + 1) for s in range(len(ratios)))
    most = 1 / (1 - first)  # later stages have nothing left before that
    return lambda amount: tuple(max(1 - amount * most * (1 - r), 1e-6) for r in ratios)


def threshold_for(
    model: PrunedModel, macs: float, images: BatchSource, example_inputs: ExampleInputs | None
) -> tuple[Budget, float]:
    """The threshold whose mean cost over some images is `macs` of the dense host's, and that share.

    Costs of images are those that each has alone: padding of a batch is not counted.

    Raises:
        PlanError: The scorer gives no probabilities, no budget is that small, or keep probabilities
            lie too close together for a threshold between them.
    """
    check_share(macs)
    pruning = pruning_of(model)
    pruning.method.check_threshold(0.5)
    batches = Batches(pruning.host, images)
    before, found = pruning.budget, list[tuple[Budget, float]]()
    low, high = -SATURATED, SATURATED  # logits of the threshold
    try:
        example = next(iter(batches)).few() if example_inputs is None else example_inputs
        costs = ImageMacs(model, example)
        least = float(costs(torch.ones(1, len(before.keep_ratios)))) / costs.dense
        check_possible(macs, least, pruning.plan.blocks)
        while high - low > 1e-5:
            middle = (low + high) / 2
            pruning.budget = before.with_threshold(1 / (1 + math.exp(-middle)))
            found.append((pruning.budget, _mean_cost(model, batches, costs)))
            if abs(found[-1][1] - macs) < CLOSE / 10:
                break
            low, high = (middle, high) if found[-1][1] > macs else (low, middle)
    finally:
        pruning.budget = before
    budget, share = min(found, key=lambda pair: abs(pair[1] - macs))
    if abs(share - macs) > CLOSE:
        reached = ", ".join(f"{b.threshold:.6g} costs {s:.3g}" for b, s in found[-2:])
        raise PlanError(
            f"asked for {macs:.3g} of the dense MACs on average; no threshold gives that for these "
            f"images: {reached}. Keep probabilities that lie so close together are those of "
            "predictors that have not learned, or learned with `sampling.counts: fixed`, which "
            "gives them an order and no scale. Train them with free counts, or leave images out."
        )
    return budget, share


@torch.no_grad()
def _mean_cost(model: PrunedModel, batches: Batches, costs: ImageMacs) -> float:
    parts = []
    with in_mode(model, training=False), model.using(path="gather"):
        for batch in batches:
            _, trace = model(*batch.args, **batch.kwargs, return_trace=True)
            parts.append(costs(trace))
    return float(torch.cat(parts).mean()) / costs.dense


def check_possible(macs: float, least: float, blocks: Sequence[int]) -> None:
    """Raise PlanError if a budget is below the least that stages at these blocks can do."""
    if least > macs + CLOSE:
        raise PlanError(
            f"asked for {macs:.3g} of the dense MACs; the least that this model can do is "
            f"{least:.3g}, with its stages at blocks {list(blocks)}. Call model.set_budget("
            f"{math.ceil(1000 * least) / 1000:g}), or put stages at earlier blocks."
        )


def check_share(macs: float) -> None:
    """Raise PlanError unless it is a share of the dense MACs."""
    if not isinstance(macs, int | float) or not 0.0 < macs <= 1.0:
        raise PlanError(
            f"asked for macs={macs!r}: give a share of the dense host's MACs in (0, 1], such as "
            "0.65."
        )
