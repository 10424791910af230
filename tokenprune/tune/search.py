"""Find at which blocks a budget is spent best, by trying on the owner's images.

Which schedule loses least differs from host to host: on one, three blocks are as good as all, on
another every block is better. So a few known ones are tried, and the best is then changed by moving
part of what leaves from one block to another. One model with a stage at every block serves all of
them: a stage that keeps everything does nothing.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from tokenprune.cost.budget import check_possible
from tokenprune.cost.image_macs import ImageMacs
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.tune.trials import Reference, Trial

__all__ = ["Schedule", "Search", "every_block"]

Ratios = tuple[float, ...]
LEAST = 1e-6


@dataclass(frozen=True)
class Schedule:
    """Shares of the tokens that are left after each block that can have a stage.

    Attributes:
        name: What it is.
        ratios: Of each of those blocks.
        macs: Share of the dense MACs.
        trial: How the model did.
    """

    name: str
    ratios: Ratios
    macs: float
    trial: Trial

    def stages(self, blocks: Sequence[int]) -> list[tuple[int, float]]:
        """(block, keep ratio) of the stages at which tokens leave."""
        shares = zip(blocks, pairwise((1.0, *self.ratios)), strict=True)
        return [(block, after) for block, (before, after) in shares if after < before]


class Search:
    """Tries schedules of one cost on one model."""

    def __init__(
        self,
        model: PrunedModel,
        reference: Reference,
        macs: float,
        known: Mapping[str, Trial],
        tried: Callable[[str, Trial], None],
        seed: int,
    ) -> None:
        """Count what stages cost.

        Args:
            model: Has a stage at every block that can have one; `every_block` makes its recipe.
            reference: The images.
            macs: The budget.
            known: Trials of an earlier, interrupted search, by their ratios.
            tried: Called with each trial.
            seed: Of what is tried, and of what the model draws.

        Raises:
            PlanError: No schedule is that cheap.
        """
        self.model, self.reference, self.macs, self.seed = model, reference, macs, seed
        self.pruning = pruning_of(model)
        self.costs = ImageMacs(model, reference.example)
        self.patches = self.costs.patches
        self.known, self.tried = known, tried
        check_possible(macs, self._cost((LEAST,) * len(self.patches)), self.pruning.plan.blocks)

    def run(self, trials: int) -> Iterator[Schedule]:
        """The schedules that are tried, as they are."""
        found = list[Schedule]()
        for name, form in _forms(len(self.patches)):
            if len(found) < trials:
                found.append(self._try(name, form))
                yield found[-1]
        draw = random.Random(self.seed)
        best = min(found, key=lambda schedule: schedule.trial.divergence)
        for number in range(len(found), trials):
            moved = _moved(best.ratios, draw)
            if moved is None:
                return
            tried = self._try(f"moved {number}", _scaled(moved))
            yield tried
            best = min(best, tried, key=lambda schedule: schedule.trial.divergence)

    def _try(self, name: str, form: Callable[[float], Ratios]) -> Schedule:
        low, high = 0.0, 1.0
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if self._cost(form(middle)) > self.macs else (low, middle)
        ratios = form(high)
        key = ",".join(f"{ratio:.6g}" for ratio in ratios)
        trial = self.known.get(key)
        if trial is None:
            self.pruning.budget = replace(self.pruning.budget, keep_ratios=ratios, threshold=None)
            trial = self.reference.trial(self.model, self.seed)
        self.tried(key, trial)
        return Schedule(name, ratios, self._cost(ratios), trial)

    def _cost(self, ratios: Ratios) -> float:
        budget = replace(self.pruning.budget, keep_ratios=ratios)
        return float(self.costs(torch.tensor([budget.counts(self.patches)]))) / self.costs.dense


def every_block(model: PrunedModel) -> list[int]:
    """The blocks at which a model's reduction can have stages; what it leaves out in front by
    default stays out."""
    pruning = pruning_of(model)
    reduction = pruning.method.reduction
    known = pruning.programs(pruning.as_wrapped()).analysis
    host = pruning.host
    blocks, _ = reduction.candidates(host, known.traced, known.blocks, pruning.spec)
    return list(blocks)[reduction.skipped :]


def _forms(blocks: int) -> list[tuple[str, Callable[[float], Ratios]]]:
    """Schedules that are known to be good somewhere: (name, amount from 0 to 1 -> ratios)."""

    def at(*parts: float) -> Callable[[float], Ratios]:
        places = sorted({min(int(blocks * part), blocks - 1) for part in parts})
        passed = [sum(place <= block for place in places) for block in range(blocks)]
        return lambda amount: tuple(max((1 - amount) ** stages, LEAST) for stages in passed)

    def falling(power: int) -> Callable[[float], Ratios]:
        weights = [float(blocks - block) ** power for block in range(blocks)]
        return _scaled([sum(weights[: block + 1]) for block in range(blocks)])

    return [
        ("at 1/4, 1/2, 3/4", at(1 / 4, 1 / 2, 3 / 4)),
        ("every block", falling(0)),
        ("every block, falling", falling(1)),
        ("every block, falling fast", falling(2)),
        ("at 1/6, 1/3, 1/2", at(1 / 6, 1 / 3, 1 / 2)),
        ("at 1/4, 1/2", at(1 / 4, 1 / 2)),
        ("at 1/3, 1/2, 2/3", at(1 / 3, 1 / 2, 2 / 3)),
    ]


def _scaled(gone: Sequence[float]) -> Callable[[float], Ratios]:
    """Amount from 0 to 1 -> ratios, where what has left up to each block grows as `gone` does."""
    first = next(share for share in gone if share > 0)
    return lambda amount: tuple(max(1 - amount * share / first, LEAST) for share in gone)


def _moved(ratios: Ratios, draw: random.Random) -> list[float] | None:
    """What has left up to each block, with half or all of one block's part moved to another; None
    if there is one block alone."""
    leaves = [before - after for before, after in pairwise((1.0, *ratios))]
    if len(leaves) < 2:
        return None
    source = draw.choice([block for block, share in enumerate(leaves) if share > 0])
    target = draw.choice([block for block in range(len(leaves)) if block != source])
    part = leaves[source] * draw.choice((0.5, 1.0))
    leaves[source] -= part
    leaves[target] += part
    return [sum(leaves[: block + 1]) for block in range(len(leaves))]
