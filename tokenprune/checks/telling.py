"""Theorem 12: a leak, had there been one, would have been seen.

A check that compares two outputs proves nothing where neither depends on what could go wrong: a
head of zeros, a branch scaled to nothing, tokens that are all equal. So a leak of known size is
followed to the outputs. Each operator that reads tokens under a decision is asked what it would
return if it ignored the decision. The difference is its leak; one backward pass through the mask
path says how much of it arrives at the outputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tokenprune.checks.certificate import Check
from tokenprune.checks.proof import Theorems
from tokenprune.checks.trainable import requiring_grad
from tokenprune.checks.unread import leaves_out, other_rows
from tokenprune.ops.layout import flat_tokens
from tokenprune.ops.pooling import hide_dropped, masked_amax
from tokenprune.rewrite.kept.token_ops import masked_max
from tokenprune.rewrite.rewrite import POLICY
from tokenprune.rewrite.settings import SETTINGS
from tokenprune.runtime.difference import difference
from tokenprune.tracing.interpret import evaluate, run, tensors_in

__all__ = ["SHARE", "Leak", "Telling", "telling"]

SHARE = 1 / 3
"""Largest share of a leak that may stay below what rounding is allowed."""
NO_GRADIENT = (masked_amax, masked_max)  # to the decision: a maximum has none


class Leak(NamedTuple):
    """What a leak at one operator does.

    Attributes:
        stage: Whose decision the operator reads; None for all operators of all stages together, and
            for rows that are left out because nobody reads them.
        size: Change of the outputs if the operator ignored the decision: root mean square, relative
            to the scale of the outputs.
        teaches: The operator has a gradient to the decision.
    """

    stage: int | None
    size: float
    teaches: bool = False


class Telling(NamedTuple):
    """How much could have been seen on one model and input.

    Attributes:
        leaks: One for each operator that reads tokens of which some are hidden.
        bound: Largest difference of outputs that counts as none.
        images_alike: The images of the batch are equal, so mixing them would not have shown.
        taught: For each stage, whether its decision gets a finite gradient from the outputs that is
            not zero; empty if that was not measured.
    """

    leaks: Sequence[Leak]
    bound: float
    images_alike: bool
    taught: Sequence[bool]

    def _hidden(self, size: float) -> float:
        """The share of a leak of this size that the bound would hide."""
        return self.bound / max(size, 1e-30)

    @property
    def _shares(self) -> list[float]:
        return [self._hidden(leak.size) for leak in self.leaks]

    @property
    def told(self) -> bool:
        """A leak would have been seen wherever there can be one."""
        return not self.images_alike and all(share <= SHARE for share in self._shares)

    @property
    def blind_stages(self) -> list[int | None]:
        """Stages none of whose leaks would have been seen, though the outputs read them. A stage
        that no output reads (bypass in the last block, for a class token) cannot be wrong, unless
        that is every stage."""
        seen = {leak.stage for leak in self.leaks if self._hidden(leak.size) <= SHARE}
        read = {leak.stage for leak in self.leaks if leak.size > 0 or not seen}
        return sorted(read - seen, key=str)

    def checks(self, proof: Theorems) -> list[Check]:
        """Lines of the certificate. An operator without effect on random weights is not read by the
        outputs at all, so what it leaks does not matter.

        Raises:
            VerificationError: Outputs that depend on a stage do not teach its decision.
        """
        shown = [share for share in self._shares if share <= SHARE]
        checks = [Check("share of a leak that could hide", max(shown, default=0.0), SHARE)]
        if self.taught:
            teaching = {leak.stage for leak in self.leaks if leak.teaches and leak.size > 0}
            untaught = [s for s, taught in enumerate(self.taught) if s in teaching and not taught]
            name = "decisions without a gradient from the outputs"
            checks.append(Check(name, float(len(untaught)), 0.0))
            if untaught:
                proof.refuse(
                    checks[-1], f"the outputs do not teach the decision of stage {untaught[0]}"
                )
        return checks


def telling(proof: Theorems) -> Telling:
    """Measure after all theorems have been checked.

    Needs the memory of a forward pass on one image that keeps its activations. Where gradients do
    not reach (a host that runs under `no_grad`, weights without a backward), and in a brief proof,
    all leaks together are measured: by the outputs with every token kept.
    """
    leaks: list[Leak] = []
    taught: list[bool] = []
    try:
        if proof.brief and proof.programs.reduction.prunes:
            raise _NoGradientError
        if proof.programs.reduction.prunes:
            leaks, taught = _follow(proof.of_one_image())
    except _NoGradientError:
        leaks, taught = [Leak(None, difference(proof.run_pruned(), proof.whole))], []
    if not proof.probabilistic:
        taught = []
    if leaves_out(proof):
        leaks.append(Leak(None, other_rows(proof)))
    return Telling(leaks, proof.bound, proof.images_alike(), taught)


class _NoGradientError(Exception):
    """Gradients of the outputs do not reach every operator."""


class _Tap(NamedTuple):
    stage: int
    edge: Any
    leak: Tensor
    teaches: bool


def _follow(proof: Theorems) -> tuple[list[Leak], list[bool]]:
    """Leaks of each operator, and whether the outputs teach each decision."""
    hides = proof.programs.reduction.hides
    rewrite = proof.programs.get(proof.host, "mask" if hides else "gather", whole=True).rewrite
    stages = {record.kept: stage for stage, record in enumerate(rewrite.records)}
    first = rewrite.records[0].entering
    start = first.all_input_nodes[0] if first.target is flat_tokens else first
    decisions: dict[int, Tensor] = {}
    taps: list[_Tap] = []

    def step(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        value = evaluate(proof.model, node, env)
        if node in stages and hides:  # gradients start here
            decisions[stages[node]] = value = value.detach().requires_grad_()
        elif node is start:
            value = value.detach().requires_grad_().clone()  # the host may write to it
        elif POLICY not in node.meta and node.target is not hide_dropped:
            taps.extend(_taps(proof.model, node, env, value))
        return value

    inputs = {SETTINGS: proof.settings, **proof.given}
    try:
        with requiring_grad(proof.model.parameters(), False), torch.enable_grad():
            *_, (_, returned) = run(proof.model, rewrite.graph, inputs, step)
            outputs = tensors_in(returned[0])
            outputs = proof.comparable(outputs) if hides else outputs
            grads = _gradients(outputs, [*(tap.edge for tap in taps), *decisions.values()])
    except RuntimeError as error:  # of a custom operator, or no memory for activations
        raise _NoGradientError from error
    if any(grad is None for grad in grads[: len(taps)]):
        raise _NoGradientError
    leaks = [
        Leak(tap.stage, _size(tap.leak, grad), tap.teaches)
        for tap, grad in zip(taps, grads, strict=False)
    ]
    return leaks, [
        grad is not None and bool(grad.any()) and bool(grad.isfinite().all())
        for grad in grads[len(taps) :]
    ]


def _taps(
    model: nn.Module, node: fx.Node, env: Mapping[fx.Node, Any], value: Any
) -> Iterator[_Tap]:
    """What a node that reads a policy would return without it."""
    for policy in node.all_input_nodes:
        if POLICY not in policy.meta or env[policy] is None or bool((env[policy] == 1).all()):
            continue
        with torch.no_grad():
            read = {used: env[used] for used in node.all_input_nodes}
            ignoring = evaluate(model, node, read | {policy: torch.ones_like(env[policy])})
        for ours, theirs in zip(tensors_in(value), tensors_in(ignoring), strict=True):
            if ours.is_floating_point():  # a count of tokens has no gradient
                edge = _edge(ours)
                teaches = node.target not in NO_GRADIENT
                yield _Tap(policy.meta[POLICY], edge, theirs - ours.detach(), teaches)


def _edge(tensor: Tensor) -> Any:
    """Where the gradient of a tensor's present value arrives, also if it is written to later."""
    if not tensor.requires_grad:
        raise _NoGradientError
    return torch.autograd.graph.get_gradient_edge(tensor)


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Any]) -> Sequence[Tensor | None]:
    """Of a random projection of the outputs, each element over its tensor's scale."""
    differentiable = [t for t in outputs if t.requires_grad and t.numel()]
    if not inputs:
        return []
    if not differentiable:
        raise _NoGradientError
    generator = torch.Generator().manual_seed(0)
    directions = []
    for tensor in differentiable:
        finite = tensor.detach().isfinite()
        scale = tensor.detach().where(finite, 0).abs().max().clamp_min(1e-6)
        noise = torch.randn(tensor.shape, generator=generator, device="cpu")
        direction = noise.to(scale) / scale * tensor.numel() ** -0.5
        directions.append(direction.where(finite, 0))
    return torch.autograd.grad(differentiable, inputs, directions, allow_unused=True)


def _size(leak: Tensor, grad: Tensor | None) -> float:
    """Change of the outputs if each element of a leak had a random sign: no two cancel."""
    effect = torch.zeros(()) if grad is None else leak.double() * grad.double()
    return float(torch.nan_to_num(effect, nan=0.0, posinf=0.0, neginf=0.0).norm())
