"""The moving average of the weights over the steps (EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenprune.errors import CheckpointError

__all__ = ["WeightAverage"]


class WeightAverage:
    """Exponential moving average of parameters and floating-point buffers.

    The decay grows with the steps t as (1 + t) / (10 + t) up to its final value, so that the
    initial weights do not dominate the average of a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the current weights; `decay` is the final value, in (0, 1)."""
        self.decay, self.steps = decay, 0
        self.average = _copies(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in _tensors(model):
            self.average[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the average inside the `with` block, its own weights afterwards."""
        trained = _copies(model)
        self.copy_to(model)
        try:
            yield
        finally:
            _put(model, trained)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` by the average."""
        _put(model, self.average)

    def save(self, file: Path) -> None:
        """Write average and step count."""
        tensors = {name: tensor.contiguous() for name, tensor in self.average.items()}
        save_file(tensors, file, metadata={"steps": str(self.steps)})

    def load(self, file: Path) -> None:
        """Read what `save` wrote, if it belongs to this model."""
        tensors = load_file(file)
        if tensors.keys() != self.average.keys():
            odd = sorted(tensors.keys() ^ self.average.keys())
            raise CheckpointError(
                f"{file} holds the average of another model: {odd[:5]} are in one of them only. "
                "Resume with the model that the run was started with."
            )
        with safe_open(file, framework="pt") as opened:
            self.steps = int(opened.metadata()["steps"])
        for name, tensor in tensors.items():
            self.average[name].copy_(tensor)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model)}


@torch.no_grad()
def _put(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, tensor in _tensors(model):
        tensor.copy_(values[name])
