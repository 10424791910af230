"""What training does to the kept share and to the predictors: two warnings.

An ordinary loop minimises the task's loss alone. Nothing then holds the kept share at its target,
or the predictors are not trained at all; both show in no loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenprune.notices import warn_once
from tokenprune.private import jit_tracing, transforms_active

__all__ = ["Watch"]

EVERY = 50  # training calls between two looks; only a look waits for the device
FIRST = 2  # looks before a verdict about the share
STILL = 6  # looks without any change before predictors count as untrained
APART = 0.1  # of the original tokens
GROWN = 0.05

MEND = """
    output, trace = model(x, return_trace=True)
    loss = tokenprune.losses.for_model(model)  # once, before the loop
    total, parts = loss(x, output, labels, trace)"""


@dataclass
class Watch:
    """Observes the training calls of one wrapped model, those that a backward pass follows.

    Attributes:
        calls: Seen since the last look.
        traced: Some of them were asked for the trace, without which there is no ratio term.
        shares: Sum of the kept share of each stage, on the model's device.
        backwards: Backward passes since the last look.
        looks: So far.
        gaps: Largest distance of a share from its target, at each of the last looks.
        sums: Of the predictors' parameters at the last look.
        still: Looks since they changed.
    """

    calls: int = 0
    traced: bool = False
    shares: Tensor | None = None
    backwards: int = 0
    looks: int = 0
    gaps: list[float] = field(default_factory=list)
    sums: Tensor | None = None
    still: int = 0

    def saw(
        self,
        model: nn.Module,
        scorers: nn.Module,
        decisions: Sequence[Tensor],
        real: Tensor | None,
        targets: Sequence[float],
        traced: bool,
    ) -> None:
        """Take note of one call.

        Args:
            model: The wrapped model.
            scorers: Its predictors.
            decisions: Of each stage, [B, N].
            real: [B, N] which patches are no padding; None if all are.
            targets: Keep ratio of each stage.
            traced: The caller asked for the trace.
        """
        if not _observable(decisions[0]):
            return
        for decision in decisions:
            if decision.requires_grad:
                decision.register_hook(self._count)  # type: ignore[no-untyped-call]
        device = decisions[0].device
        found = [_share(decision.detach(), real).to(device) for decision in decisions]
        shares = torch.stack(found)
        before = self.shares
        if before is None or before.device != device:
            self.shares, self.calls = shares, 1
        else:
            self.shares, self.calls = before + shares, self.calls + 1
        self.traced = self.traced or traced
        if self.calls < EVERY:
            return
        if self.backwards:
            self.looks += 1
            self._look_at_predictors(model, scorers)
            self._look_at_shares(model, targets)
        self.calls, self.traced, self.shares, self.backwards = 0, False, None, 0

    def _count(self, grad: Tensor) -> None:
        self.backwards += 1

    def _look_at_predictors(self, model: nn.Module, scorers: nn.Module) -> None:
        parameters = list(scorers.parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            if self.looks >= FIRST:
                warn_once(
                    model,
                    "frozen predictors",
                    f"no parameter of the predictors of this {type(model).__name__} requires a "
                    "gradient, so they do not learn which tokens to keep. Call "
                    "model.token_predictors.requires_grad_(True) and give their parameters to the "
                    "optimizer, or ignore this if they were trained before.",
                )
            self.sums, self.still = None, 1
            return
        sums = _sums(parameters)
        before, self.sums = self.sums, sums
        same = before is not None and before.device == sums.device and torch.equal(before, sums)
        self.still = self.still + 1 if same else 0
        if self.still >= STILL:
            warn_once(
                model,
                "predictors not trained",
                f"the predictors of this {type(model).__name__} have not changed in "
                f"{STILL * EVERY} training calls. Give their parameters to the optimizer too: "
                "optimizer.add_param_group({'params': model.token_predictors.parameters()}), or "
                "make it from model.parameters() after wrap.",
            )

    def _look_at_shares(self, model: nn.Module, targets: Sequence[float]) -> None:
        if self.shares is None or self.still:
            self.gaps.clear()
            return
        shares = (self.shares / self.calls).tolist()
        gap = max(abs(share - target) for share, target in zip(shares, targets, strict=True))
        self.gaps = [*self.gaps[-FIRST:], gap]
        # with the trace there may be a ratio term, which closes a gap, if slowly
        drifts = not self.traced or gap > self.gaps[0] + GROWN
        if gap > APART and drifts and len(self.gaps) >= FIRST:
            kept, wanted = ([f"{x:.2f}" for x in found] for found in (shares, targets))
            warn_once(
                model,
                "no ratio term",
                f"this {type(model).__name__} keeps [{', '.join(kept)}] of its tokens in training, "
                f"where its keep ratios are [{', '.join(wanted)}] (stage by stage): its loss lacks "
                f"the ratio term, which holds the kept share at its target. Train with:{MEND}",
            )


def _observable(decision: Tensor) -> bool:
    """Whether values may be kept: not those of a tracer, a transform of functions, a CUDA graph."""
    if not torch.is_grad_enabled() or type(decision) is not Tensor or decision.is_meta:
        return False
    if jit_tracing() or transforms_active():
        return False
    return not (decision.is_cuda and torch.cuda.is_current_stream_capturing())


def _sums(parameters: Sequence[Tensor]) -> Tensor:
    """The sum of each parameter, or of the part of it that this rank has."""
    with torch.no_grad():
        local = [getattr(p, "to_local", lambda p=p: p)() for p in parameters]
        return torch.stack([p.double().sum().to(local[0].device) for p in local])


def _share(decision: Tensor, real: Tensor | None) -> Tensor:
    """Mean kept share of the real tokens."""
    if real is None:
        return decision.mean(dtype=torch.float32)
    weight = real.to(torch.float32)
    return (decision * weight).sum() / weight.sum().clamp_min(1)
