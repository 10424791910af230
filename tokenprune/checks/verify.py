"""Prove on one model that its paths agree."""

import torch
from torch import nn

from tokenprune.checks.certificate import Certificate
from tokenprune.checks.proof import Theorems
from tokenprune.errors import UnsupportedHostError
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.state import attributes_kept, buffers_kept, kept_modes

__all__ = ["verify"]


def verify(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, gradients: bool = True
) -> Certificate:
    """Check the theorems on a wrapped model, in eval mode, and put everything back as it was.

    Args:
        model: What `wrap` returned.
        example_inputs: As for `wrap`.
        gradients: Also run the mask path backward; needs the memory of a training step.

    Raises:
        NotWrappedError: `model` is not wrapped.
        UnsupportedHostError: It has no weights: it is on the meta device.
        VerificationError: A theorem does not hold; the first node where the paths differ is named.
    """
    pruning = pruning_of(model)
    inputs = pruning.inputs(example_inputs)
    meta_param = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta_param is not None:
        raise UnsupportedHostError(
            f"Parameter '{meta_param}' of {type(model).__name__} is on the meta device and holds "
            "no weights, so nothing can be verified. Load the weights first, or pass verify=False "
            "to wrap, which is enough for profile."
        )
    with kept_modes(model), attributes_kept(pruning.host), buffers_kept(model):
        model.eval()
        with torch.no_grad():  # each proof takes the programs of the modes that it runs in
            proof = Theorems(model, inputs)
            checks = [*proof.identity(), *proof.paths(), *proof.contents(), *proof.images()]
        if gradients:
            checks += Theorems(model, inputs).gradients()
    return Certificate(
        host=type(model).__name__,
        adapter=pruning.spec.adapter,
        mode=pruning.method.reduction.name,
        num_patches=proof.num_patches[0],
        patches_per_stage=proof.num_patches,
        num_prefix_tokens=pruning.plan.num_prefix,
        num_keep=pruning.budget.counts(proof.num_patches),
        threshold=pruning.budget.threshold,
        checks=tuple(checks),
    )
