"""The recipe's `train` section as arguments of `transformers.Trainer`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from tokenprune.errors import PlanError
from tokenprune.recipe import Recipe
from tokenprune.recipe.schema import TrainSection
from tokenprune.train.order import steps_per_epoch
from tokenprune.train.run_folder import KEPT_CHECKPOINTS

__all__ = ["Progress", "SaveEvery", "training_arguments", "with_overrides"]

SaveEvery = Literal["epoch", "never"] | int
Progress = Callable[[int, int, dict[str, float]], None]


def with_overrides(recipe: Recipe, **overrides: Any) -> Recipe:
    """The recipe with other values in its `train` section; None keeps a value."""
    given = {key: value for key, value in overrides.items() if value is not None}
    if not given:
        return recipe
    mapping = recipe.model_dump(mode="json", exclude_none=True)
    mapping["train"] |= given
    return Recipe.parse(mapping, "the recipe with your changes")


def training_arguments(
    config: TrainSection,
    output_dir: Path,
    *,
    num_images: int,
    accumulation_steps: int = 1,
    save_every: SaveEvery = "epoch",
    evaluates: bool = True,
    show_bar: bool = False,
    num_workers: int = 0,
) -> TrainingArguments:
    """Arguments for a run; the optimiser, its schedule and the data order are the trainer's own.

    Checkpoints go to `output_dir`, after each epoch, never, or every so many optimiser steps.
    """
    use_cpu = not torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and use_cpu:
        raise PlanError(
            "train.mixed_precision is 'fp16', which needs an accelerator, found none. Use "
            "'bf16' or 'no'."
        )
    saves: dict[str, Any] = {"save_strategy": "no" if save_every == "never" else save_every}
    if isinstance(save_every, int):
        saves = {"save_strategy": "steps", "save_steps": save_every}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=config.epochs,
        gradient_accumulation_steps=accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_grad or 0.0,
        bf16=config.mixed_precision == "bf16",
        fp16=config.mixed_precision == "fp16",
        seed=config.seed % 2**32,  # numpy takes 32 bits
        use_cpu=use_cpu,
        save_total_limit=KEPT_CHECKPOINTS,
        eval_strategy="epoch" if evaluates else "no",
        logging_strategy="steps",
        logging_steps=min(50, steps_per_epoch(num_images, config.batch_size)),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not show_bar,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=num_workers,
        dataloader_pin_memory=not use_cpu,
        ddp_find_unused_parameters=False,
        **saves,
    )
    # one process, one device: replicas in threads would share noise and trace
    arguments._n_gpu = min(arguments.n_gpu, 1)
    parts = accumulation_steps * arguments.world_size
    arguments.per_device_train_batch_size = max(config.batch_size // parts, 1)
    return arguments
