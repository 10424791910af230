"""Train a dense host, where no published weights fit: for the demo and for benchmarks."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tokenprune.recipe_schema import TrainSection
from tokenprune.train.arguments import Progress, training_arguments
from tokenprune.train.data import DataBundle
from tokenprune.train.fitting import FitResult, run_trainer
from tokenprune.train.image_trainer import ImageTrainer

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
    progress: bool | Progress = True,
    num_workers: int = 0,
    **settings: Any,
) -> FitResult:
    """Train a dense host in place by cross entropy; nothing is kept on disk.

    Args:
        host: As its library builds it, not wrapped.
        data: What `load_data` returned.
        epochs: Passes over the images.
        batch_size: Images of an optimiser step over all processes.
        learning_rate: Peak rate of all parameters; cosine decay after the warm-up.
        weight_decay: Of AdamW; biases and other parameters of one dimension get none.
        warmup_epochs: Over which the rate grows.
        seed: Of data order, dropout and mixing.
        progress: As for `fit`.
        num_workers: Processes that read images.
        settings: Further fields of `TrainSection`: `mixup`, `clip_grad`, `mixed_precision`, ...

    Raises:
        PlanError: The host's head has another number of classes than the data.
        DataError: An image cannot be read.
    """
    wishes = TrainSection(
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
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            wishes,
            Path(folder),
            num_images=len(data.train),  # type: ignore[arg-type]
            save_every="never",
            evaluates=False,
            show_bar=progress is True,
            num_workers=num_workers,
        )
        trainer = ImageTrainer(
            host, arguments, data, wishes, progress=progress if callable(progress) else None
        )
        return run_trainer(trainer)
