"""`compare`: what methods cost and lose on one's own model and images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenprune.analysis.plan import Budget
from tokenprune.cost.budget import budget_for
from tokenprune.cost.timing import interleaved
from tokenprune.errors import PlanError
from tokenprune.hosts.batches import Batch, Batches, BatchSource
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import load_recipe
from tokenprune.recipe.methods import Method, list_methods, method_named
from tokenprune.report.plots import draw_costs
from tokenprune.report.progress import ShowProgress, steps
from tokenprune.report.table import Table
from tokenprune.runtime.model import PRUNING, PrunedModel, pruning_of
from tokenprune.scorers import SCORERS
from tokenprune.tracing.state import in_mode
from tokenprune.tune.divergence import Distance, Read
from tokenprune.tune.trials import Reference, Trial
from tokenprune.wrapping import wrap

__all__ = ["Comparison", "Row", "compare"]

THIS_MODEL = "this model"
TIMED_ROUNDS = 5
TURN = 0.2


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: Its name, as `wrap` takes it; `this model` is the wrapped model that was given.
        macs: Share of the dense MACs.
        trial: What it loses.
        seconds: Of one batch, the median of turns that all rows took; None if not timed.
    """

    method: str
    macs: float
    trial: Trial
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: In the order of methods and budgets.
        left_out: Method -> why it does not serve this host.
        distance: `kl` or `cosine`.
        images: How many.
        dense_accuracy: Of the host without pruning; None without labels.
        dense_seconds: Of one batch; None if not timed.
    """

    rows: tuple[Row, ...]
    left_out: dict[str, str]
    distance: Distance
    images: int
    dense_accuracy: float | None
    dense_seconds: float | None

    def best(self, macs: float) -> Row:
        """The row that loses least at a budget: with labels among the most accurate, as far as so
        many images tell (one standard error), the one nearest to the dense output."""
        near = min(abs(row.macs - macs) for row in self.rows)
        rows = [row for row in self.rows if abs(row.macs - macs) <= near + 0.02]
        best = max(row.trial.accuracy or 0.0 for row in rows)
        error = (best * (1 - best) / self.images) ** 0.5
        rows = [row for row in rows if (row.trial.accuracy or 0.0) >= best - error]
        return min(rows, key=lambda row: row.trial.divergence)

    def advice(self, macs: float) -> str:
        """The method that won at a budget, and the lines that use it."""
        best = self.best(macs)
        if best.method == THIS_MODEL:
            return f"model.set_budget({macs:g})"
        wrapped = any(row.method == THIS_MODEL for row in self.rows)
        host = "tokenprune.unwrap(model)" if wrapped else "model"
        return f'model = tokenprune.wrap({host}, "{best.method}")\nmodel.set_budget({macs:g})'

    def table(self) -> Table:
        """All rows."""
        accurate, timed = self.dense_accuracy is not None, self.dense_seconds is not None
        columns = ["method", "MACs", "divergence"]
        columns += ["same class"] * (self.distance == "kl")
        columns += ["accuracy", "points lost"] * accurate
        columns += ["time"] * timed
        rows = [self._cells(row, accurate, timed) for row in self.rows]
        dense = f", dense accuracy {100 * (self.dense_accuracy or 0):.2f} %" if accurate else ""
        note = [f"MACs, time: of the dense host's. Divergence: {self.distance}."]
        note += [f"{method} is left out: {why}" for method, why in self.left_out.items()]
        return Table(f"{self.images} images{dense}", tuple(columns), tuple(rows), "\n".join(note))

    def _cells(self, row: Row, accurate: bool, timed: bool) -> tuple[str, ...]:
        cells = [row.method, f"{row.macs:.3f}", f"{row.trial.divergence:.4g}"]
        if self.distance == "kl":
            cells.append(f"{100 * (row.trial.agreement or 0.0):.2f} %")
        if accurate:
            found, dense = row.trial.accuracy or 0.0, self.dense_accuracy or 0.0
            cells += [f"{100 * found:.2f} %", f"{100 * (dense - found):+.2f}"]
        if timed:
            cells.append(f"{(row.seconds or 0.0) / (self.dense_seconds or 1.0):.2f}")
        return tuple(cells)

    def plot(self, path: str | Path) -> Path:
        """Write a picture of cost against what is lost: PNG, SVG or PDF, by the ending."""
        if self.dense_accuracy is not None:
            dense = self.dense_accuracy
            lost = [100 * (dense - (row.trial.accuracy or 0.0)) for row in self.rows]
            what = "points of accuracy lost"
        else:
            lost = [row.trial.divergence for row in self.rows]
            what = f"divergence ({self.distance})"
        points = [(r.method, r.macs, loss) for r, loss in zip(self.rows, lost, strict=True)]
        return draw_costs(Path(path), points, what, lines=True)

    def __str__(self) -> str:
        return str(self.table())


def compare(
    model: nn.Module,
    batches: BatchSource,
    labels: Any = None,
    *,
    methods: Sequence[str | Method] | None = None,
    macs: Sequence[float] = (0.8, 0.65, 0.5),
    read: Read | None = None,
    divergence: Distance | None = None,
    adapter: str | ArchSpec | None = None,
    restore: bool | None = None,
    timed: bool = True,
    seed: int = 0,
    progress: ShowProgress = True,
) -> Comparison:
    """Prune one's own model by several methods at several budgets, without training, and see what
    each costs and loses on one's own images.

    Args:
        model: A host, which is left as it is; or what `wrap` returned, which is then one of the
            rows, at its own method and weights.
        batches: As for `calibrate`. Whole numbers beside the images of a batch are their labels.
        labels: [N] for all images in order; None takes those of the batches, if they hold any.
        methods: Names or objects; all that need no training if None. A row of `auto` has the name
            of what that chose.
        macs: Shares of the dense host's MACs.
        read: As for `calibrate`.
        divergence: As for `calibrate`.
        adapter: As for `wrap`.
        restore: As for `wrap`.
        timed: Also time one batch of each row, in turns.
        seed: Of what is drawn.
        progress: As for `calibrate`.

    Raises:
        HostError: There are no images, they do not fit the host, or labels do not fit them.
        PlanError: No method serves this host at any of these budgets; says why of each.
    """
    given = model if isinstance(model, PrunedModel) and hasattr(model, PRUNING) else None
    host = pruning_of(given).host if given is not None else model
    reference = Reference(host, Batches(host, batches, labels), read, divergence)
    options: dict[str, Any] = {"adapter": adapter, "restore": restore}
    if given is not None:
        options = {"adapter": pruning_of(given).adapter, "restore": pruning_of(given).restore}
    options |= {"example_inputs": reference.example, "verify": False, "train": False}
    chosen = list(_untrained() if methods is None else methods)
    rows: list[Row] = []
    running: dict[int, tuple[PrunedModel, Budget]] = {}
    left_out: dict[str, str] = {}
    total = (len(chosen) + (given is not None)) * len(macs)
    with steps("comparing", total, progress) as done:
        for method in [*([THIS_MODEL] if given is not None else []), *chosen]:
            name = method if isinstance(method, str) else method.name
            try:
                mine = given if name == THIS_MODEL else wrap(host, method, **options)
                assert mine is not None  # noqa: S101 - this model is in the list only if given
            except PlanError as error:
                left_out[name] = str(error)
                continue
            if mine is not given and load_recipe(method).is_open:
                name = pruning_of(mine).recipe.name
            for wanted in macs:
                try:
                    budget, share = budget_for(mine, wanted, reference.example)
                except PlanError as error:
                    left_out[f"{name} at {wanted:g}"] = str(error)
                    continue
                with _at(mine, budget):
                    running[len(rows)] = mine, budget
                    rows.append(Row(name, share, reference.trial(mine, seed)))
                done(f"{name} at {wanted:g}")
    if not rows:
        reasons = [f"{method}: {why}" for method, why in left_out.items()]
        raise PlanError("\n  - ".join([f"No method serves this {type(host).__name__}:", *reasons]))
    dense_seconds = None
    if timed:
        seconds = _time(host, running, next(iter(reference.batches)))
        dense_seconds = seconds[-1]
        rows = [replace(row, seconds=seconds[number]) for number, row in enumerate(rows)]
    facts = (left_out, reference.distance, reference.images, reference.accuracy, dense_seconds)
    return Comparison(tuple(rows), *facts)


def _untrained() -> list[str]:
    """Names of the methods that need no training, and have a budget."""
    named = [method_named(name) for name in list_methods()]
    methods = [m for m in named if m is not None and m.letter is not None]
    return [m.name for m in methods if not SCORERS[load_recipe(m).scorer].probabilistic]


@contextmanager
def _at(model: PrunedModel, budget: Budget) -> Iterator[None]:
    """A model with another budget, for a while."""
    pruning = pruning_of(model)
    was, pruning.budget = pruning.budget, budget
    try:
        yield
    finally:
        pruning.budget = was


def _time(
    host: nn.Module, running: dict[int, tuple[PrunedModel, Budget]], batch: Batch
) -> dict[int, float]:
    """Seconds of one batch, of each row and (-1) of the dense host."""

    def call(model: PrunedModel, budget: Budget) -> None:
        with _at(model, budget):
            model(*batch.args, **batch.kwargs)

    calls: dict[str, Any] = {str(n): partial(call, *row) for n, row in running.items()}
    calls["-1"] = partial(host, *batch.args, **batch.kwargs)
    device = next(iter(host.parameters())).device
    with torch.no_grad(), in_mode(host, training=False):
        found = interleaved(calls, rounds=TIMED_ROUNDS, turn_seconds=TURN, device=device)
    return {int(number): timing.seconds for number, timing in found.items()}
