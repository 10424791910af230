"""`calibrate`: spend a budget where a model loses least, on unlabelled images."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.cost.budget import budget_for, check_share
from tokenprune.cost.profile import profile
from tokenprune.errors import PlanError
from tokenprune.hosts.batches import Batches, BatchSource
from tokenprune.recipe import Recipe
from tokenprune.report.plots import draw_costs
from tokenprune.report.progress import ShowProgress, steps
from tokenprune.report.table import Table
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.tune.divergence import Distance, Read
from tokenprune.tune.fit import check_same, fit_predictors
from tokenprune.tune.search import Schedule, Search, every_block
from tokenprune.tune.trials import Reference, Trial
from tokenprune.wrapping import wrap

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        method: `reduction` and `scorer` of the model.
        distance: How outputs were compared: `kl` or `cosine`.
        images: How many were used.
        before: How the model did before, and its share of the dense MACs.
        after: How it does now.
        tried: The schedules that were tried; none where predictors were fitted.
        recipe: What the model runs now.
        seconds: How long it took.
    """

    method: str
    distance: Distance
    images: int
    before: tuple[Trial, float]
    after: tuple[Trial, float]
    tried: tuple[Schedule, ...]
    recipe: Recipe
    seconds: float

    def table(self) -> Table:
        """What was tried, best first."""
        rows = [("before", *self.before), ("after", *self.after)]
        ranked = sorted(self.tried, key=lambda schedule: schedule.trial.divergence)
        rows += [(schedule.name, schedule.trial, schedule.macs) for schedule in ranked]
        return Table(
            f"{self.method}, calibrated on {self.images} images in {self.seconds:.0f} s",
            ("", "MACs", "divergence", "same class"),
            tuple(
                (name, f"{macs:.3f}", f"{trial.divergence:.4g}", _percent(trial.agreement))
                for name, trial, macs in rows
            ),
            f"MACs: of the dense host's. Divergence: {self.distance}, from its output.",
        )

    def plot(self, path: str | Path) -> Path:
        """Write a picture of cost against divergence: PNG, SVG or PDF, by the ending."""
        points = [(s.name, s.macs, s.trial.divergence) for s in self.tried]
        points += [
            (name, macs, trial.divergence)
            for name, (trial, macs) in (("before", self.before), ("after", self.after))
        ]
        return draw_costs(Path(path), points, f"divergence ({self.distance})")

    def __str__(self) -> str:
        return str(self.table())


def calibrate(
    model: nn.Module,
    batches: BatchSource,
    macs: float | None = None,
    *,
    trials: int = 24,
    fit_steps: int = 200,
    learning_rate: float = 1e-3,
    read: Read | None = None,
    divergence: Distance | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    progress: ShowProgress = True,
) -> Calibration:
    """Make a wrapped model lose as little as it can at a budget, without labels.

    What is compared is the pruned output with the dense host's, on the same images. Merging, and
    scorers without parameters: schedules are tried, at which blocks how many tokens leave, and the
    model takes the best. Learned predictors: they alone are fitted to the dense outputs, with the
    host frozen; where they do worse than before on these images, they stay what they were. The
    same images and seed give the same result.

    Args:
        model: What `wrap` returned; it is changed in place. Its mode, and the host's weights, stay.
        batches: Images like those that will come, some hundred: a tensor [N, ...], a list of
            batches or a DataLoader. A batch is a tensor, a mapping of arguments, or a tuple that
            begins with one of these; labels are not read.
        macs: Share of the dense host's MACs, in (0, 1]; what the model costs now if None. A
            threshold is given up: every image then keeps the same number of tokens.
        trials: How many schedules are tried.
        fit_steps: Batches that predictors learn from, taken in turn.
        learning_rate: Of the predictors.
        read: Takes what the host returns and gives the tensor [B, ...] that matters; logits, or the
            one embedding, if None.
        divergence: `kl` or `cosine`; see `tokenprune.tune.divergence`. By default `kl` for class
            logits, `cosine` for embeddings.
        seed: Of what is tried and drawn.
        resume: A file. What is found is kept there, and an interrupted call of the same model,
            images, budget and seed goes on from it.
        progress: A bar on a terminal; or a function of (done, total, text).

    Raises:
        NotWrappedError: `model` is not wrapped.
        PlanError: The predictors are frozen. The budget is out of (0, 1] or below what this model
            can do; the message says
            how much that is. Or `resume` is the file of another calibration.
        HostError: There are no images, or they do not fit the host.
    """
    started = time.perf_counter()
    pruning = pruning_of(model)
    if macs is not None:
        check_share(macs)
    _check_trainable(model)
    assert isinstance(model, PrunedModel)  # noqa: S101 - pruning_of has looked
    reference = Reference(pruning.host, Batches(pruning.host, batches), read, divergence)
    example = reference.example
    share = profile(model, example).ratio
    wanted = share if macs is None else macs
    file = None if resume is None else Path(resume)
    tried: list[Schedule] = []
    was = dict(vars(pruning))
    pruning.fitted = True  # else the first trial says that the predictors need this very call
    try:
        before = reference.trial(model, seed), share
        if pruning.method.reduction.removes and not pruning.method.scorer.probabilistic:
            tried = _search(model, reference, wanted, trials, seed, file, progress)
        else:
            pruning.budget, _ = budget_for(model, wanted, example)
        trial = reference.trial(model, seed)
        if pruning.method.scorer.probabilistic:
            fit = (fit_steps, learning_rate, seed)
            trial = _fit(model, reference, trial, *fit, file, progress)
    except BaseException:
        vars(pruning).update(was)
        raise
    after = trial, profile(model, example).ratio
    method = f"{pruning.method.reduction.name}, {pruning.recipe.scorer}"
    seconds = time.perf_counter() - started
    facts = (reference.distance, reference.images, before, after, tuple(tried))
    return Calibration(method, *facts, pruning.recipe, seconds)


def _check_trainable(model: nn.Module) -> None:
    """Raise PlanError if predictors would have to be fitted, and all of them are frozen."""
    own = list(model.get_submodule(PREDICTORS).parameters())
    if own and not any(parameter.requires_grad for parameter in own):
        raise PlanError(
            "calibrate fits the predictors of this model, but all are frozen (requires_grad is "
            f"False). Call model.{PREDICTORS}.requires_grad_(True) first; freeze them again "
            "afterwards if you like."
        )


def _fit(
    model: PrunedModel,
    reference: Reference,
    start: Trial,
    number: int,
    learning_rate: float,
    seed: int,
    file: Path | None,
    progress: ShowProgress,
) -> Trial:
    """Fit the predictors; how the model does then. So few steps may do harm: where they do, the
    predictors stay what they were."""
    predictors = model.get_submodule(PREDICTORS)
    before = {name: value.clone() for name, value in predictors.state_dict().items()}
    fit: dict[str, Any] = {"steps": number, "learning_rate": learning_rate, "seed": seed}
    try:
        with steps("fitting predictors", number, progress) as done:
            fit_predictors(model, reference, **fit, resume=file, done=done)
        trial = reference.trial(model, seed)
    except BaseException:
        predictors.load_state_dict(before)
        raise
    if trial.divergence <= start.divergence:
        return trial
    predictors.load_state_dict(before)
    return start


def _search(
    model: PrunedModel,
    reference: Reference,
    macs: float,
    trials: int,
    seed: int,
    file: Path | None,
    progress: ShowProgress,
) -> list[Schedule]:
    """Try schedules, and let the model take the best."""
    pruning = pruning_of(model)
    blocks = every_block(model)
    shares = [1 - (place + 1) / (2 * len(blocks)) for place in range(len(blocks))]
    options: dict[str, Any] = {"adapter": pruning.adapter, "restore": pruning.restore}
    options |= {"example_inputs": reference.example, "verify": False, "train": False}
    trial_model = wrap(pruning.host, pruning.recipe.with_stages(blocks, shares), **options)
    told = reference.told_by(pruning.recipe.to_yaml(), macs, seed)
    known = _read(file, told)
    with steps("trying schedules", trials, progress) as done:

        def tried(key: str, trial: Trial) -> None:
            known[key] = trial
            _write(file, told, known)
            done(f"divergence {trial.divergence:.3g}")

        search = Search(trial_model, reference, macs, known, tried, seed)
        found = list(search.run(trials))
    best = min(found, key=lambda schedule: schedule.trial.divergence)
    stages = best.stages(blocks)
    chosen = pruning.recipe.with_stages(*zip(*stages, strict=True)) if stages else pruning.recipe
    new = wrap(pruning.host, chosen, **options)
    pruning.become(pruning_of(new))
    return found


def _read(file: Path | None, told: str) -> dict[str, Trial]:
    if file is None or not file.exists():
        return {}
    kept = json.loads(file.read_text())
    check_same(file, kept.get("of"), told)
    return {key: Trial(**trial) for key, trial in kept["trials"].items()}


def _write(file: Path | None, told: str, known: dict[str, Trial]) -> None:
    if file is not None:
        part = file.with_suffix(".part")
        trials = {key: asdict(trial) for key, trial in known.items()}
        part.write_text(json.dumps({"of": told, "trials": trials}))
        part.replace(file)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
