"""Accuracy on the evaluation images, by default on the gather path."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tokenprune.errors import NotWrappedError
from tokenprune.losses.logits import class_logits
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.tracing.state import in_mode
from tokenprune.train.data import DataBundle
from tokenprune.train.folders import DataError

__all__ = ["evaluate", "kept_tokens", "score"]


def evaluate(
    model: nn.Module,
    data: DataBundle,
    path: Path = "gather",
    batch_size: int = 256,
    *,
    progress: Callable[[int], Any] | None = None,
) -> float:
    """Accuracy on `data.eval`, in [0, 1].

    The model runs in eval mode on its own device; its mode is restored.

    Args:
        model: wrapped; or a host, for which `path` must be "dense".
        data: what `load_data` returned.
        path: "gather" removes tokens, "mask" hides them, "dense" keeps them.
        batch_size: images per forward; does not change the result.
        progress: called after each batch with the number of images done.

    Raises:
        NotWrappedError: `model` is a host and `path` is not "dense".
        DataError: there is no image to evaluate on.
        PlanError: the classes of data and host differ in number.
    """
    images = data.eval
    everything = range(len(images))  # type: ignore[arg-type]
    given = (images, everything, data.num_classes, path, batch_size)
    correct, _, count = score(model, *given, progress=progress)
    return correct / count


def kept_tokens(model: nn.Module, data: DataBundle, batch_size: int = 256) -> Tensor:
    """How many patch tokens each image of `data.eval` keeps after each stage in eval.

    Counts differ between images under a threshold; `ImageMacs` gives their cost.

    Args:
        model: what `wrap` returned; its mode is restored.
        data: what `load_data` returned.
        batch_size: images per forward; does not change the result.

    Returns:
        [images, stages].

    Raises:
        NotWrappedError: `model` is not wrapped.
        DataError: there is no image to evaluate on.
    """
    pruning_of(model)
    device = next(model.parameters()).device
    counts = []
    with in_mode(model, training=False), torch.no_grad(), _on(model, "gather"):
        for batch in _batches(data.eval, batch_size):
            _, trace = model(batch["pixel_values"].to(device), return_trace=True)
            counts.append(torch.stack([stage.decision.sum(1) for stage in trace.stages], dim=1))
    return torch.cat(counts)


def score(
    model: nn.Module,
    images: Dataset[Any],
    chosen: Sequence[int],
    num_classes: int,
    path: Path | None,
    batch_size: int,
    num_workers: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> tuple[float, float, float]:
    """Over the chosen images: how many are right, the sum of the cross entropy, how many there are.

    Sums of several processes can be added.
    """
    device = next(model.parameters()).device
    correct = loss = count = 0.0
    with in_mode(model, training=False), torch.no_grad(), _on(model, path):
        for batch in _batches(Subset(images, chosen), batch_size, num_workers):
            labels = batch["labels"].to(device)
            logits = class_logits(model(batch["pixel_values"].to(device)), num_classes).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
            if progress is not None:
                progress(int(count))
    return correct, loss, count


def _batches(images: Dataset[Any], batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    if not len(images):  # type: ignore[arg-type]
        raise DataError("There is no image to evaluate on. Give data with an evaluation part.")
    # without a generator the loader would draw from the global one, and so change training
    return DataLoader(
        images, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator()
    )


def _on(model: nn.Module, path: Path | None) -> AbstractContextManager[Any]:
    if isinstance(model, PrunedModel):
        return model.using(path=path)
    if path not in (None, "dense"):
        raise NotWrappedError(
            f"{type(model).__name__} is not wrapped, so it has no {path!r} path. Evaluate it with "
            'path="dense", or what tokenprune.wrap(model, recipe) returns.'
        )
    return nullcontext()
