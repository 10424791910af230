"""Fit predictors alone, without labels, to the dense model's own outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.hosts.batches import Batch
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.tracing.state import in_mode, kept_modes
from tokenprune.tune.divergence import distances
from tokenprune.tune.trials import Reference

__all__ = ["check_same", "fit_predictors"]

SAVE_EVERY = 10


def fit_predictors(
    model: PrunedModel,
    reference: Reference,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    resume: Path | None = None,
    done: Callable[[str], None],
) -> None:
    """Train the predictors of a wrapped model, the host frozen and in eval mode.

    The loss is the divergence from the dense outputs; each image keeps as many tokens as it will in
    eval, drawn by scores with noise (`sampling.counts: fixed`). Steps go over the batches again and
    again.

    Args:
        steps: Batches to learn from.
        learning_rate: The peak; a cosine brings it to 0.
        seed: Of the decisions.
        resume: File that is read if it is there, and written now and then.
        done: Called after each step with a text.
    """
    pruning = pruning_of(model)
    predictors = model.get_submodule(PREDICTORS)
    parameters = list(predictors.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first, recipe = 0, pruning.recipe
    told = reference.told_by(recipe.to_yaml(), pruning.budget, steps, learning_rate, seed)
    fixed = recipe.sampling.model_copy(update={"counts": "fixed"})
    if resume is not None and resume.exists():
        saved = torch.load(resume, map_location=parameters[0].device, weights_only=True)
        check_same(resume, saved["of"], told)
        predictors.load_state_dict(saved["predictors"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    pruning.recipe = recipe.model_copy(update={"sampling": fixed})
    try:
        with _only(model):
            for step, (batch, dense) in enumerate(_cycle(reference)):
                if step == steps:
                    break
                if step < first:
                    done("resumed")
                    continue
                device = parameters[0].device
                generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
                with model.using(path="mask", generator=generator):
                    output = model(*batch.args, **batch.kwargs)
                pruned = reference.read(output)
                loss = distances(reference.distance, dense.to(device), pruned).mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                done(f"divergence {float(loss.detach()):.3g}")
                if resume is not None and (step + 1) % SAVE_EVERY == 0:
                    state = {"predictors": predictors.state_dict(), "step": step + 1, "of": told}
                    state |= {"optimizer": optimizer.state_dict()}
                    _save(resume, {**state, "schedule": schedule.state_dict()})
    finally:
        pruning.recipe = recipe
        optimizer.zero_grad()


def _cycle(reference: Reference) -> Iterator[tuple[Batch, Tensor]]:
    while True:
        yield from zip(reference.batches, reference.outputs, strict=True)


def _save(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def check_same(file: Path, of: Any, told: str) -> None:
    """Raise PlanError if a file was written by another calibration (`Reference.told_by`)."""
    if of != told:
        raise PlanError(
            f"{str(file)!r} holds another calibration: of other images, weights, budget, recipe or "
            "seed. Remove the file, or give another one as `resume`."
        )


@contextmanager
def _only(model: PrunedModel) -> Iterator[None]:
    """Gradients for the predictors alone; the host's layers in eval mode, so that it is the one
    that will run."""
    host = pruning_of(model).host
    frozen = [p for p in host.parameters() if p.requires_grad]
    # in eval mode, but for the flag by which a call draws decisions: no `train` of the host's runs
    with kept_modes(model), in_mode(model, training=False):
        model.training = True
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
