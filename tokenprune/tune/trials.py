"""Run a model over a caller's images, against what the dense host gave for them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import HostError
from tokenprune.hosts.batches import Batch, Batches
from tokenprune.runtime.model import PrunedModel
from tokenprune.tracing.state import in_mode
from tokenprune.tune.divergence import Distance, Read, distance_of, distances, main_output

__all__ = ["Reference", "Trial"]


@dataclass(frozen=True)
class Trial:
    """How a pruned model did.

    Attributes:
        divergence: Mean over the images; see `Distance`.
        agreement: Share of images whose largest logit is the dense host's; None for embeddings.
        accuracy: Share of images whose largest logit is the label's; None without labels.
    """

    divergence: float
    agreement: float | None
    accuracy: float | None


class Reference:
    """What the dense host gives for each image.

    Attributes:
        host: The host.
        batches: The images.
        example: Two of them, as `wrap` takes them.
        distance: How outputs are compared.
        accuracy: Of the dense host; None without labels.
        images: How many there are.
    """

    def __init__(
        self, host: nn.Module, batches: Batches, read: Read | None, distance: Distance | None
    ) -> None:
        """Run the dense host over all images."""
        self.host, self.batches, self.read = host, batches, read or main_output
        self.example: Any = next(iter(batches)).few()
        self.outputs: list[Tensor] = []
        labels: list[Tensor] = []
        with torch.no_grad(), in_mode(host, training=False):
            for batch in batches:
                output = _dense(host, batch)
                found = self._read(output, batch)
                self.outputs.append(found.cpu())
                if batch.labels is not None:
                    labels.append(batch.labels.cpu())
        self.images = sum(map(len, self.outputs))
        logits = read is None and (isinstance(output, Tensor) or "logits" in _fields(output))
        self.distance = distance_of(distance, self.outputs[0], logits)
        self.labels = torch.cat(labels) if labels else None
        self.accuracy = None
        if self.labels is not None and self.distance == "kl":
            _check_labels(self.labels, self.outputs[0].shape[1])
            self.accuracy = _share(torch.cat(self.outputs).argmax(1) == self.labels)

    def told_by(self, *facts: Any) -> str:
        """A number for these images, the host's weights and other facts: what is kept in a file of
        one calibration holds for no other."""
        told = hashlib.sha256(repr((self.distance, *facts)).encode())
        for output in self.outputs:
            told.update(output.float().contiguous().numpy().tobytes())
        return told.hexdigest()

    def trial(self, model: PrunedModel, seed: int = 0) -> Trial:
        """Run a wrapped model over all images; whatever it draws, it draws by `seed`."""
        parts, agree, right, at = [], [], [], 0
        for batch, dense, pruned in self.pairs(model, seed):
            parts.append(distances(self.distance, dense, pruned))
            if self.distance == "kl":
                best = pruned.argmax(1)
                agree.append(best == dense.argmax(1))
                if self.labels is not None:
                    right.append(best.cpu() == self.labels[at : at + batch.size])
            at += batch.size
        divergence = float(torch.cat(parts).double().mean())
        agreement = _share(torch.cat(agree)) if agree else None
        return Trial(divergence, agreement, _share(torch.cat(right)) if right else None)

    def pairs(self, model: PrunedModel, seed: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """(batch, dense output, pruned output) of each batch."""
        with torch.no_grad(), _running(self.host, model, seed):
            for batch, dense in zip(self.batches, self.outputs, strict=True):
                output = self._read(model(*batch.args, **batch.kwargs), batch)
                yield batch, dense.to(output.device), output

    def _read(self, output: Any, batch: Batch) -> Tensor:
        found = self.read(output)
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != batch.size:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise HostError(
                f"`read` must give a tensor with one row an image, [{batch.size}, ...], found "
                f"{shape}."
            )
        return found


def _dense(host: nn.Module, batch: Batch) -> Any:
    try:
        return host(*batch.args, **batch.kwargs)
    except Exception as error:
        given = [x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor)]
        shapes = ", ".join(str(list(x.shape)) for x in given)
        raise HostError(
            f"{type(host).__name__} does not take this batch, {shapes}: {type(error).__name__}: "
            f"{error}. Give images of the size, and arguments of the names, that the host was "
            "built for."
        ) from error


@contextmanager
def _running(host: nn.Module, model: PrunedModel, seed: int) -> Iterator[None]:
    device = next(iter(host.parameters())).device
    generator = torch.Generator(device).manual_seed(seed)
    with in_mode(model, training=False), model.using(path="gather", generator=generator):
        yield


def _fields(output: Any) -> list[str]:
    return list(output) if hasattr(output, "keys") else []


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _check_labels(labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise HostError(
            f"Labels are from {low} to {high}, but the host gives logits of {classes} classes, 0 "
            f"to {classes - 1}. Give the labels that the host was trained with."
        )
