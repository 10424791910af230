"""The training loss: classification, kept share, and distillation from the dense host.

DynamicViT (Rao et al., 2021), section 3.3, with the details of its published training code.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from tokenprune.errors import PlanError

__all__ = ["PruningLoss", "distill_logits", "distill_tokens", "ratio_loss"]

TokenDistance = Literal["mse", "kl"]


def _wide(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cast to fp32 or better: losses are sums of many small numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def ratio_loss(
    decisions: Sequence[Float[Tensor, "B N"]],
    keep_ratios: Sequence[float],
    per_image: bool = True,
    real: Shaped[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the stages of (kept share - keep_ratio)^2 (DynamicViT, the ratio term).

    Args:
        decisions: of each stage, over the original patch tokens, with gradient.
        keep_ratios: target share of the original tokens, one per stage.
        per_image: square the distance of each image and average; False squares the distance of
            the batch's mean share, so that images may differ.
        real: which tokens are not padding (`PruningTrace.real`): shares count only those. None
            counts all tokens.

    Raises:
        PlanError: decisions and ratios differ in number, or there are none.
    """
    if not decisions or len(decisions) != len(keep_ratios):
        raise PlanError(
            f"the ratio loss needs one decision for each keep_ratio, found {len(decisions)} "
            f"decisions and {len(keep_ratios)} ratios; pass the decisions of all stages"
        )
    gaps = []
    for decision, keep_ratio in zip(decisions, keep_ratios, strict=True):
        share = _wide(decision).mean(1) if real is None else _share(_wide(decision), real)
        gaps.append(((share if per_image else share.mean()) - keep_ratio).square().mean())
    return torch.stack(gaps).mean()


def _share(decision: Float[Tensor, "B N"], real: Shaped[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Kept share of the real tokens of each text; 1 where there are none."""
    weight = real.to(decision.dtype)
    count = weight.sum(1)
    return ((decision * weight).sum(1) + (count == 0)) / count.clamp_min(1)


def distill_logits(
    student: Float[Tensor, "*batch C"], teacher: Float[Tensor, "*batch C"]
) -> Float[Tensor, ""]:
    """KL divergence of the student's classes from the teacher's, mean over the rows.

    Args:
        student: class logits.
        teacher: class logits of the dense host; gets no gradient.
    """
    return _divergence(_wide(student), _wide(teacher.detach())).mean()


def _divergence(
    student: Float[Tensor, "*batch C"], teacher: Float[Tensor, "*batch C"]
) -> Float[Tensor, "*batch"]:
    """KL(teacher || student) of each row of logits."""
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def distill_tokens(
    student_tokens: Float[Tensor, "B N D"],
    teacher_tokens: Float[Tensor, "B N D"],
    decision: Float[Tensor, "B N"] | None,
    kind: TokenDistance = "mse",
) -> Float[Tensor, ""]:
    """Distance of the final tokens from the teacher's, mean over the kept tokens of the batch.

    Reads nothing of dropped tokens and gives the decision no gradient, as in DynamicViT. Zero,
    but part of the graph, when no token is kept. No shape depends on the decision.

    Args:
        student_tokens: final patch tokens of the mask path.
        teacher_tokens: final patch tokens of the dense host; get no gradient.
        decision: of the last stage; None compares all tokens.
        kind: `mse` averages squares over channels too; `kl` treats each token as class logits
            (LV-ViT's dense head) and sums the divergence over the classes.
    """
    student, teacher = _wide(student_tokens), _wide(teacher_tokens.detach())
    if decision is None:
        count: Tensor | int = student.shape[0] * student.shape[1]
    else:
        kept = (decision.detach() > 0.5).unsqueeze(-1)
        # Before any arithmetic, so that neither inf nor NaN of a dropped token has a gradient.
        student, teacher = student.where(kept, 0), teacher.where(kept, 0)
        count = kept.sum().clamp_min(1)
    if kind == "mse":
        return (student - teacher).square().mean(-1).sum() / count
    return _divergence(student, teacher).sum() / count


@dataclass(frozen=True, kw_only=True)
class PruningLoss:
    """The weighted sum of the four parts; the fields are those of a recipe's `loss` section.

        loss = PruningLoss(keep_ratios=(0.7, 0.49, 0.343), **recipe.loss.model_dump())
        total, parts = loss(logits, labels, decisions, teacher_logits=...)

    Attributes:
        keep_ratios: target of each stage.
        classification: weight of the classification loss.
        ratio: weight of `ratio_loss`.
        distill_logits: weight of `distill_logits`.
        distill_tokens: weight of `distill_tokens`.
        ratio_per_image: see `ratio_loss`.
        token_distance: `kind` of `distill_tokens`.
        token_set: `kept` compares the tokens that the last stage kept, `all` every token.
        criterion: (logits, target) to a scalar; cross entropy takes class indices and, for mixup,
            class probabilities.
    """

    keep_ratios: Sequence[float]
    classification: float = 1.0
    ratio: float = 2.0
    distill_logits: float = 0.5
    distill_tokens: float = 0.5
    ratio_per_image: bool = True
    token_distance: TokenDistance = "mse"
    token_set: Literal["kept", "all"] = "kept"
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def __call__(
        self,
        logits: Float[Tensor, "B C"],
        target: Shaped[Tensor, "B ..."],
        decisions: Sequence[Float[Tensor, "B N"]],
        *,
        teacher_logits: Float[Tensor, "B C"] | None = None,
        student_tokens: Float[Tensor, "B N D"] | None = None,
        teacher_tokens: Float[Tensor, "B N D"] | None = None,
        real: Bool[Tensor, "B N"] | None = None,
    ) -> tuple[Float[Tensor, ""], Mapping[str, Float[Tensor, ""]]]:
        """The loss of a batch; a part whose weight is 0 is not computed.

        Args:
            logits: of the student.
            target: class indices [B] or probabilities [B, C].
            decisions: of each stage, from the trace.
            teacher_logits: needed unless the weight `distill_logits` is 0.
            student_tokens: final patch tokens; needed unless the weight `distill_tokens` is 0.
            teacher_tokens: as `student_tokens`.
            real: of the trace; which tokens are not padding, all if None.

        Returns:
            The weighted sum, and each part by the name of its weight, unweighted and detached.

        Raises:
            PlanError: a part with a weight lacks its tensors.
        """
        parts: dict[str, Tensor] = {}
        if self.classification:
            parts["classification"] = self.criterion(_wide(logits), target)
        if self.ratio:
            parts["ratio"] = ratio_loss(decisions, self.keep_ratios, self.ratio_per_image, real)
        if self.distill_logits:
            if teacher_logits is None:
                raise self._lacks("distill_logits", "teacher_logits")
            parts["distill_logits"] = distill_logits(logits, teacher_logits)
        if self.distill_tokens:
            if student_tokens is None or teacher_tokens is None:
                raise self._lacks("distill_tokens", "student_tokens and teacher_tokens")
            # final tokens on another grid than the stages': all of them are there again
            same = decisions[-1].shape[1] == student_tokens.shape[1]
            last = decisions[-1] if self.token_set == "kept" and same else None
            parts["distill_tokens"] = distill_tokens(
                student_tokens, teacher_tokens, last, self.token_distance
            )
        total = _wide(logits).new_zeros(())
        for name, part in parts.items():
            total = total + getattr(self, name) * part
        return total, {name: part.detach() for name, part in parts.items()}

    def _lacks(self, weight: str, tensors: str) -> PlanError:
        return PlanError(
            f"the loss weight {weight} is {getattr(self, weight)}, found no {tensors}; "
            f"pass {tensors}, or set {weight} to 0"
        )
