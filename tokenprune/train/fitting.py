"""`fit`: train a wrapped model, or resume an interrupted run."""

import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from tokenprune.analysis.plan import Budget
from tokenprune.errors import PlanError
from tokenprune.recipe import Recipe, RecipeSource, load_recipe
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.state import kept_modes
from tokenprune.train.arguments import Progress, SaveEvery, training_arguments, with_overrides
from tokenprune.train.data import DataBundle
from tokenprune.train.image_trainer import ImageTrainer
from tokenprune.train.run_folder import RunFolder
from tokenprune.train.trainer import PruningTrainer

__all__ = ["FitResult", "describe_run", "fit", "run_trainer"]

TEACHER = "teacher.safetensors"


@dataclass
class FitResult:
    """Result of a run.

    Attributes:
        metrics: `accuracy` in [0, 1] and `loss` on the held-out images; `steps`, `epochs`, and
            `seconds` of this call.
        history: all log entries, those before a resume included: each has `step` and `epoch`, and
            either `loss` and its parts, or `eval_accuracy` and `eval_loss`.
    """

    metrics: dict[str, float]
    history: list[dict[str, float]] = field(repr=False)


def fit(
    recipe: RecipeSource | None,
    model: nn.Module,
    data: DataBundle,
    output_dir: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    accumulation_steps: int = 1,
    resume: bool = True,
    progress: bool | Progress = True,
    teacher: nn.Module | None = None,
    save_every: SaveEvery = "epoch",
    num_workers: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> FitResult:
    """Train a wrapped model in place by a recipe's `loss` and `train` sections.

    Under `torchrun` every process calls this with the same arguments.

    Args:
        recipe: As for `wrap`; the model's own if None.
        model: What `wrap` returned.
        data: What `load_data` returned, or another `DataBundle`.
        output_dir: Checkpoints go here, in `checkpoint-<step>`; the newest two are kept.
        epochs: Overrides the recipe.
        batch_size: Overrides the recipe; images per optimiser step over all processes.
        accumulation_steps: Backward passes per optimiser step.
        resume: Resume from the newest whole checkpoint in `output_dir`, if any. False deletes
            existing checkpoints.
        progress: A bar on standard error, or a function that is called after each step with
            (step, total steps, latest logs).
        teacher: A host or a wrapped model, run dense; a frozen copy of the model if None. A resumed
            run keeps its first teacher.
        save_every: "epoch", "never", or a number of optimiser steps.
        num_workers: Processes that read images.
        callbacks: Additional callbacks of `transformers.Trainer`.

    Raises:
        NotWrappedError: `model` is not wrapped.
        RecipeError: The recipe cannot be read, or `epochs` or `batch_size` is below 1.
        PlanError: Recipe, model, data and number of processes do not fit together.
        DataError: An image cannot be read.
        CheckpointError: `output_dir` holds another run.
    """
    pruning = pruning_of(model)
    if recipe is None:
        recipe = pruning.recipe
    else:
        recipe = load_recipe(recipe)
        _check_ratios(recipe, pruning.budget)
    recipe = with_overrides(recipe, epochs=epochs, batch_size=batch_size)
    arguments = training_arguments(
        recipe.train,
        Path(output_dir),
        num_images=len(data.train),  # type: ignore[arg-type]
        accumulation_steps=accumulation_steps,
        save_every=save_every,
        show_bar=progress is True,
        num_workers=num_workers,
    )
    trainer = PruningTrainer(
        model,
        arguments,
        data,
        recipe=recipe,
        teacher=teacher,
        progress=progress if callable(progress) else None,
        callbacks=list(callbacks),
    )
    run = RunFolder(Path(output_dir), arguments.distributed_state)
    description = {
        "recipe": recipe.model_dump(mode="json", exclude={"description", "host", "name", "source"}),
        "keep_ratios": pruning.budget.keep_ratios,
        "host": type(pruning.host).__name__,
        **describe_run(trainer),
    }
    checkpoint = run.begin(description, resume)
    if trainer.teacher is not None and (checkpoint is not None or save_every != "never"):
        run.share_weights(trainer.teacher, TEACHER, resumed=checkpoint is not None)
    return run_trainer(trainer, checkpoint)


def _check_ratios(recipe: Recipe, budget: Budget) -> None:
    """Training aims at the model's ratios, so a recipe must not say others."""
    wanted = tuple(stage.keep_ratio for stage in recipe.resolved_stages)
    if len(wanted) == len(budget.keep_ratios) and wanted != budget.keep_ratios:
        raise PlanError(
            f"The recipe keeps {list(wanted)}, the model {list(budget.keep_ratios)}. Call "
            f"model.set_keep_ratio({list(wanted)}) first, or leave out the recipe."
        )


def describe_run(trainer: ImageTrainer) -> dict[str, Any]:
    """What determines the weights besides host and recipe, for `RunFolder`."""
    data, arguments = trainer.data, trainer.args
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "images": len(data.train),  # type: ignore[arg-type]
        "labels": zlib.crc32(repr(getattr(data.train, "labels", None)).encode()),
        "classes": list(data.class_names),
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "processes": arguments.world_size,
        "accumulation_steps": arguments.gradient_accumulation_steps,
    }


def run_trainer(trainer: ImageTrainer, checkpoint: Path | None = None) -> FitResult:
    """Train or resume, evaluate, and restore the mode of every module."""
    started, training = time.perf_counter(), trainer.model.training
    with kept_modes(trainer.model):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        scores = trainer.final_scores()
        trainer.model.train(training)  # a host may have a way of its own to change modes
    counts = {"steps": trainer.state.global_step, "epochs": trainer.config.epochs}
    metrics = {**scores, **counts, "seconds": time.perf_counter() - started}
    return FitResult(metrics, list(trainer.state.log_history))
