"""Random weights and inputs in which an error shows."""

import torch
from torch import Tensor, nn

from tokenprune.tracing.arguments import Arguments

__all__ = ["enliven", "enlivened_inputs"]


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Overwrite all parameters, and buffers that are zero, so that nothing is too faint to be seen.

    Scales, norms and gates become random in (0.5, 1.5), biases of scale 0.1, and everything else
    gets the scale at which a product keeps that of what it takes. What is no plain floating tensor
    (quantised or sharded weights) stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kept = isinstance(tensor, nn.Parameter) or not bool(tensor.any())
            if kept and tensor.is_floating_point() and type(tensor.data) is Tensor:
                drawn = torch.empty(tensor.shape, device="cpu", dtype=torch.float32)
                tensor.copy_(_draw(name.rpartition(".")[2], drawn, generator))


def _draw(name: str, drawn: Tensor, generator: torch.Generator) -> Tensor:
    shape = drawn.shape
    if drawn.ndim < 2 or drawn.numel() == max(shape):  # a vector, whatever its shape
        if "bias" in name:
            return drawn.normal_(std=0.1, generator=generator)
        return drawn.uniform_(0.5, 1.5, generator=generator)
    # tables [1, N, D] and stacks of matrices keep rows of their last dim
    inputs = shape[-1] if drawn.ndim == 3 or shape[0] == 1 else drawn[0].numel()
    return drawn.normal_(std=max(inputs, 1) ** -0.5, generator=generator)


def enlivened_inputs(inputs: Arguments, seed: int = 0) -> Arguments:
    """The same arguments with noise on images and features, so that no two tokens are equal.

    Masks and token numbers, which are whole numbers or have no third dim, stay.
    """
    generator = torch.Generator().manual_seed(seed)

    floats = {n: x for n, x in inputs.tensors.items() if x.is_floating_point() and x.ndim > 2}
    noise = {n: torch.randn(x.shape, generator=generator, device="cpu") for n, x in floats.items()}
    return inputs.with_tensors({name: x + noise[name].to(x) for name, x in floats.items()})
