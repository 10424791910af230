"""The loss of a wrapped model, with the weights of its recipe, for any training loop."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.errors import PlanError
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.losses.logits import class_logits
from tokenprune.losses.pruning_loss import PruningLoss
from tokenprune.recipe.schema import LossSection
from tokenprune.rewrite.kept.pruning_trace import PruningTrace
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.tracing.state import in_mode
from tokenprune.wrapping import wrap

__all__ = ["ModelLoss", "for_model"]

Parts = dict[str, Tensor]


def for_model(model: nn.Module, teacher: nn.Module | None = None) -> "ModelLoss":
    """The loss that a wrapped model's recipe describes.

        loss = tokenprune.losses.for_model(model, teacher=copy.deepcopy(host))
        output, trace = model(images, return_trace=True)
        total, parts = loss(images, output, labels, trace)
        total.backward()

    Targets are the model's own keep ratios at the time of each call, after `set_keep_ratio` too.
    A model whose scorer has no parameters (`random`, `token-norm`, `key-norm`) has no ratio term:
    it keeps what its ratios say; nor has one that trains with `sampling.counts: fixed`. A model in
    mode `bypass` has all terms.

    Args:
        model: What `wrap` returned, not compiled and not inside another wrapper (DDP).
        teacher: A host, or a wrapped model, that runs dense, in eval mode and without gradients. It
            is not copied: pass a copy, or it learns with the model that shares its weights. Without
            one there are no distillation terms, whatever the recipe says.

    Raises:
        NotWrappedError: `model` is not wrapped.
    """
    return ModelLoss(model, pruning_of(model).recipe.loss, teacher)


class ModelLoss:
    """`for_model` with another recipe section or criterion."""

    def __init__(
        self,
        model: nn.Module,
        section: LossSection,
        teacher: nn.Module | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        """Keep what every call needs.

        Args:
            model: What `wrap` returned.
            section: Weights of the terms.
            teacher: See `for_model`.
            criterion: See `PruningLoss`.
        """
        self.model, self.teacher, self.pruning = model, teacher, pruning_of(model)
        weights = section.model_dump()
        if teacher is None:
            weights |= {"distill_logits": 0.0, "distill_tokens": 0.0}
        if not self.pruning.method.scorer.probabilistic:
            weights["ratio"] = 0.0
        self.fixed = self.pruning.recipe.sampling.counts == "fixed"
        self.weights = PruningLoss(keep_ratios=(), criterion=criterion, **weights)

    def __call__(
        self, inputs: ExampleInputs, output: Any, labels: Tensor, trace: PruningTrace
    ) -> tuple[Tensor, Parts]:
        """The loss of one call of the model.

        Args:
            inputs: What the model was called with: a tensor, several in order, or arguments by
                name. Only the teacher reads them.
            output: What the model returned: logits [B, C], a tuple that starts with them, or an
                object with `logits`.
            labels: Class indices [B], or probabilities [B, C].
            trace: What the model returned beside the output.

        Returns:
            The weighted sum, and each term by the name of its weight, unweighted and detached.

        Raises:
            HostError: The output holds no class logits.
            PlanError: There is no trace, or labels or teacher do not fit the model's outputs.
            UnsupportedHostError: In the first call: the teacher cannot be wrapped, which token
                distillation needs.
        """
        if not isinstance(trace, PruningTrace):
            raise PlanError(
                "The loss needs the trace of the call for its ratio term, found "
                f"{type(trace).__name__}. Call output, trace = model(x, return_trace=True)."
            )
        logits = class_logits(output)
        _check_labels(labels, logits)
        budget = self.pruning.budget
        loss = replace(self.weights, keep_ratios=budget.keep_ratios)
        if self.fixed and budget.threshold is None:
            loss = replace(loss, ratio=0.0)
        decisions = [stage.decision for stage in trace.stages]
        operands = self._operands(inputs, trace, logits.shape[1])
        total, parts = loss(logits, labels, decisions, **operands, real=trace.real)
        return total, dict(parts)

    def _operands(
        self, inputs: ExampleInputs, trace: PruningTrace, num_classes: int
    ) -> dict[str, Tensor]:
        """What the distillation terms compare."""
        teacher, tokens_too = self.teacher, bool(self.weights.distill_tokens)
        if teacher is None or not (self.weights.distill_logits or tokens_too):
            return {}
        if tokens_too and not isinstance(teacher, PrunedModel):
            self.teacher = teacher = self._wrapped(teacher, inputs)
        options = {"return_trace": True} if tokens_too else {}
        dense_path = isinstance(teacher, PrunedModel)
        path: AbstractContextManager[Any] = teacher.using("dense") if dense_path else nullcontext()  # type: ignore[operator]
        with torch.no_grad(), in_mode(teacher, training=False), path:
            if isinstance(inputs, Mapping):
                output = teacher(**inputs, **options)
            else:
                output = teacher(*((inputs,) if isinstance(inputs, Tensor) else inputs), **options)
            if not tokens_too:
                return {"teacher_logits": class_logits(output, num_classes)}
            output, dense = output
            teacher_tokens = self._compared(teacher, dense)
        tokens = self._compared(self.model, trace)
        if tokens.shape[1] != teacher_tokens.shape[1]:
            tokens = _put_back(tokens, teacher_tokens, trace)
        return {
            "teacher_logits": class_logits(output, num_classes),
            "student_tokens": tokens,
            "teacher_tokens": teacher_tokens,
        }

    def _wrapped(self, teacher: nn.Module, inputs: ExampleInputs) -> PrunedModel:
        """A host whose tokens can be asked for."""
        known = self.pruning
        found: PrunedModel = wrap(
            teacher,
            known.recipe,
            example_inputs=inputs,
            adapter=known.adapter if type(teacher) is type(known.host) else None,
            restore=known.restore,
            verify=False,
        )
        return found

    def _compared(self, model: nn.Module, trace: PruningTrace) -> Tensor:
        """Operands of the token term: final patch tokens, or their logits for `kl`."""
        if self.weights.token_distance == "mse":
            return trace.patch_tokens
        head = getattr(model, "aux_head", None)
        if not isinstance(head, nn.Module):
            raise PlanError(
                "loss.token_distance is 'kl', which compares the class logits of tokens, but "
                f"{type(model).__name__} has no dense head (`aux_head`, as LV-ViT has). Use 'mse'."
            )
        logits: Tensor = head(trace.patch_tokens)
        return logits


def _put_back(tokens: Tensor, dense: Tensor, trace: PruningTrace) -> Tensor:
    """Kept tokens [B, K, D] at their places in the teacher's [B, N, D]."""
    kept = trace.stages[-1].keep_indices
    if kept is None:
        raise PlanError(
            f"The model's final tokens {tuple(tokens.shape)} are not the teacher's "
            f"{tuple(dense.shape)}. Use a teacher with the same patches."
        )
    length = dense.shape[1]
    places = torch.where(kept < 0, length, kept).unsqueeze(-1).expand_as(tokens)
    one_more = torch.cat([dense, dense[:, :1]], dim=1).to(tokens.dtype)
    return one_more.scatter(1, places, tokens)[:, :length]


def _check_labels(labels: Any, logits: Tensor) -> None:
    batch, classes = logits.shape
    if isinstance(labels, Tensor):
        indices = labels.shape == (batch,) and not labels.is_floating_point()
        if indices or (labels.shape == logits.shape and labels.is_floating_point()):
            return
        found = f"a {labels.dtype} tensor {tuple(labels.shape)}"
    else:
        found = type(labels).__name__
    raise PlanError(
        f"The loss needs class indices [{batch}] or probabilities [{batch}, {classes}] as labels, "
        f"found {found}. Pass torch.tensor([...]) of whole numbers, one for each image."
    )
