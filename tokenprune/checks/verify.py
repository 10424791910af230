"""Prove on one model that its paths agree."""

import copy
import math
from dataclasses import replace

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tokenprune.analysis.analysis import Analysis
from tokenprune.checks.certificate import Certificate, Check
from tokenprune.checks.enliven import enliven, enlivened_inputs
from tokenprune.checks.proof import Theorems
from tokenprune.checks.telling import telling
from tokenprune.checks.unread import unread
from tokenprune.errors import UnsupportedHostError, VerificationError
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.reductions import Reduction
from tokenprune.runtime.model import pruning_of
from tokenprune.runtime.step_values import hides_its_node
from tokenprune.runtime.steps import prove_steps
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.state import attributes_kept, buffers_kept, in_mode

__all__ = ["takes_long", "verify", "verify_wrapped"]


BIG = 1e11
"""MACs of an image from which on `wrap` makes the brief proof: forwards take most of its time."""


def verify(
    model: nn.Module, example_inputs: ExampleInputs | None = None, *, gradients: bool = True
) -> Certificate:
    """Check the theorems on a wrapped model, in eval mode, and put everything back as it was.

    Where a leak would not have shown in this model's outputs (a head of zeros, LayerScale near 0,
    tokens that are all equal, low precision), everything is proven again on a copy with random
    weights and inputs, in float32 or better. That needs the memory of the copy.

    Args:
        model: What `wrap` returned.
        example_inputs: As for `wrap`.
        gradients: Also run the mask path backward; needs the memory of a training step.

    Raises:
        NotWrappedError: `model` is not wrapped.
        UnsupportedHostError: It has no weights: it is on the meta device.
        VerificationError: A theorem does not hold; the first node where the paths differ is named.
            Or the outputs do not depend on what a stage drops, whatever the weights.
        LeakError: An operator mixes tokens behind weights that are zero now.
    """
    return _verify(model, example_inputs, gradients, math.inf)


def verify_wrapped(model: nn.Module, example_inputs: ExampleInputs) -> Certificate:
    """What `wrap` proves: no gradients; where an image takes more than 100 GMACs, theorems 2 to 4
    in one run on one image, and all leaks together."""
    return _verify(model, example_inputs, False, BIG)


def _verify(
    model: nn.Module, example_inputs: ExampleInputs | None, gradients: bool, big: float
) -> Certificate:
    pruning = pruning_of(model)
    inputs = pruning.inputs(example_inputs)
    meta_param = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta_param is not None:
        raise UnsupportedHostError(
            f"Parameter '{meta_param}' of {type(model).__name__} is on the meta device and holds "
            "no weights, so nothing can be verified. Load the weights first, or pass verify=False "
            "to wrap, which is enough for profile."
        )
    evaluated = in_mode(model, training=False)
    with evaluated, attributes_kept(pruning.host):
        with torch.no_grad():
            proof = Theorems(model, inputs)
            if brief := _macs(model, proof.programs.analysis) >= big:
                proof = Theorems(model, inputs, brief=True).of_one_image()
        with buffers_kept(pruning.host, [proof.programs.analysis.traced.graph]):
            checks = [*proof.checks(gradients), *unread(proof)]
            told = telling(proof)
            if told.told:
                checks += told.checks(proof)
            else:
                checks += _on_a_copy(proof, gradients)
            if not brief and _may_open(pruning.host, proof.programs.reduction):
                prove_steps(pruning.host, pruning.added, proof.programs, proof.inputs)
    proof.programs.proven, pruning.proven_hooks = True, RemovableHandle.next_id
    return Certificate(
        host=type(model).__name__,
        adapter=pruning.spec.adapter,
        mode=pruning.method.reduction.name,
        num_patches=proof.num_patches[0],
        patches_per_stage=proof.num_patches,
        num_prefix_tokens=proof.programs.analysis.plan.num_prefix,
        num_keep=pruning.budget.counts(proof.num_patches),
        threshold=pruning.budget.threshold,
        checks=tuple(checks),
        enlivened=not told.told,
    )


def _may_open(host: nn.Module, reduction: Reduction) -> bool:
    """Whether weights that are zero now may hide what mixes tokens, where no NaN in dropped tokens
    shows it."""
    if reduction.removes and reduction.hides:
        return False
    weights = (p for n, p in host.named_parameters() if not n.endswith("bias"))
    return any(map(hides_its_node, weights))


def takes_long(model: nn.Module, analysis: Analysis) -> bool:
    """Whether `wrap` makes the brief proof."""
    return _macs(model, analysis) >= BIG


def _macs(model: nn.Module, analysis: Analysis) -> float:
    """About how many multiply-accumulates an image takes: of weights, and of attention."""
    grid = max(analysis.grids, key=lambda grid: grid.length)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return grid.length * (parameters + 2 * len(analysis.blocks) * grid.length * grid.num_channels)


def _on_a_copy(given: Theorems, gradients: bool) -> list[Check]:
    """The checks on a copy with random weights and inputs, in which a leak shows; in float64 if it
    does not in float32."""
    model, programs = given.model, given.programs
    lively, inputs = copy.deepcopy(model), enlivened_inputs(given.inputs)
    enliven(lively)
    pruning_of(lively).cache.proven_next = True
    for dtype in (torch.promote_types(given.dtype, torch.float32), torch.float64):
        lively = lively.to(dtype)
        tensors = inputs.in_dtype(dtype)
        alike = _dtypes(lively, tensors) == _dtypes(model, inputs)
        with torch.no_grad():
            own = programs if alike and programs.serve_copies else None
            proof = Theorems(lively, tensors, own, brief=given.brief)
        checks = [*proof.checks(gradients), *unread(proof)]
        told = telling(proof)
        if not told.blind_stages:
            break
    else:
        stage, blocks = told.blind_stages[0], pruning_of(model).plan.blocks
        where = "" if stage is None else f" at stage {stage} (block {blocks[stage]})"
        raise VerificationError(
            f"{type(model).__name__} cannot be proven: its outputs do not depend on which tokens "
            f"are dropped{where}, even with random weights and inputs, so no check could see an "
            "error there. Prune before an earlier block, return an output that depends on the "
            "tokens, or pass verify=False to wrap if that is meant."
        )
    checks += told.checks(proof)
    return [replace(check, name=f"{check.name}, enlivened") for check in checks]


def _dtypes(model: nn.Module, inputs: Arguments) -> list[torch.dtype]:
    """What a trace of a model's call holds for."""
    held = (*model.parameters(), *model.buffers(), *inputs.tensors.values())
    return [tensor.dtype for tensor in held]
