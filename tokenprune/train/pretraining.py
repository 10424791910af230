"""`pretrain`: train a dense host where no published weights fit."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from tokenprune.recipe.schema import TrainSection
from tokenprune.train.arguments import Progress, training_arguments
from tokenprune.train.data import DataBundle
from tokenprune.train.fitting import FitResult, describe_run, run_trainer
from tokenprune.train.image_trainer import ImageTrainer
from tokenprune.train.run_folder import RunFolder

__all__ = ["pretrain"]


def pretrain(
    host: nn.Module,
    data: DataBundle,
    epochs: int,
    *,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_epochs: int = 2,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | Progress = True,
    num_workers: int = 0,
    **settings: Any,
) -> FitResult:
    """Train a dense host in place by cross entropy.

    Args:
        host: As its library builds it, not wrapped.
        data: What `load_data` returned.
        epochs: Passes over the images.
        batch_size: Images of an optimiser step over all processes.
        learning_rate: Peak rate of all parameters; cosine decay after the warm-up.
        weight_decay: Of AdamW; biases and other parameters of one dimension get none.
        warmup_epochs: Over which the rate grows.
        seed: Of data order, dropout and mixing.
        output_dir: Checkpoints go here, as for `fit`; None keeps nothing on disk.
        resume: As for `fit`.
        progress: As for `fit`.
        num_workers: Processes that read images.
        settings: Further fields of `TrainSection`: `mixup`, `clip_grad`, `mixed_precision`, ...

    Raises:
        PlanError: The host's head has another number of classes than the data.
        DataError: An image cannot be read.
        CheckpointError: `output_dir` holds another run.
    """
    config = TrainSection(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        backbone_lr_scale=1.0,
        frozen_epochs=0,
        seed=seed,
        **settings,
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch if output_dir is None else output_dir)
        arguments = training_arguments(
            config,
            folder,
            num_images=len(data.train),  # type: ignore[arg-type]
            save_every="never" if output_dir is None else "epoch",
            evaluates=False,
            show_bar=progress is True,
            num_workers=num_workers,
        )
        trainer = ImageTrainer(
            host, arguments, data, config, progress=progress if callable(progress) else None
        )
        run = RunFolder(folder, arguments.distributed_state)
        description = {"train": config.model_dump(mode="json"), "host": type(host).__name__}
        return run_trainer(trainer, run.begin(description | describe_run(trainer), resume))
