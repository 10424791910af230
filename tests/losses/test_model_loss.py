"""`losses.for_model`: the recipe's loss for any training loop."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.analysis.test_reading import IMAGES, Pairs
from tests.toys.table import TOYS
from tests.toys.vit import CLASSES, Vit, pixels
from tokenprune.errors import HostError, NotWrappedError, PlanError
from tokenprune.losses import PruningLoss, distill_logits, distill_tokens, for_model, ratio_loss

TOY = TOYS["prefix_1"]
X, LABELS = pixels(3, 16), torch.tensor([0, 1, 2])


def wrapped(host: nn.Module | None = None, **recipe: Any) -> Any:
    torch.manual_seed(0)
    given = {"adapter": TOY.facts, "example_inputs": TOY.inputs(), "verify": False}
    return tokenprune.wrap(host or TOY.build(), {**TOY.recipe, **recipe}, **given).train()


def called(model: Any, x: Tensor = X) -> tuple[Any, Any]:
    return model(x, return_trace=True)


def test_weights_and_ratios_are_the_models() -> None:
    section = {"classification": 0.5, "ratio": 3.0, "distill_logits": 0.25, "distill_tokens": 0.125}
    model, teacher = wrapped(loss=section), TOY.build(1)
    total, parts = for_model(model, teacher)(X, *(c := called(model))[:1], LABELS, c[1])
    output, trace = c
    dense = wrapped(teacher)
    with torch.no_grad(), dense.eval().using("dense"):
        theirs, dense_trace = called(dense)
    decisions = [stage.decision for stage in trace.stages]
    wanted = {
        "classification": F.cross_entropy(output, LABELS),
        "ratio": ratio_loss(decisions, (0.6, 0.36)),
        "distill_logits": distill_logits(output, theirs),
        "distill_tokens": distill_tokens(
            trace.patch_tokens, dense_trace.patch_tokens, decisions[-1]
        ),
    }
    assert parts.keys() == wanted.keys()
    for name, part in parts.items():
        torch.testing.assert_close(part, wanted[name].detach())
        assert part.shape == ()
        assert not part.requires_grad
    torch.testing.assert_close(total, sum(section[name] * wanted[name] for name in wanted))
    total.backward()
    assert all(p.grad is not None for p in model.token_predictors.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


def test_targets_follow_the_budget() -> None:
    model = wrapped()
    loss = for_model(model)
    output, trace = called(model)
    decisions = [stage.decision for stage in trace.stages]
    for ratios in ((0.6, 0.36), (0.9, 0.2)):
        model.set_keep_ratio(ratios)
        wanted = ratio_loss(decisions, ratios).detach()
        torch.testing.assert_close(loss(X, output, LABELS, trace)[1]["ratio"], wanted)


def test_without_a_teacher_there_is_no_distillation() -> None:
    model = wrapped()
    output, trace = called(model)
    assert list(for_model(model)(X, output, LABELS, trace)[1]) == ["classification", "ratio"]


def test_fixed_counts_need_no_ratio_term_and_are_those_of_eval() -> None:
    model = wrapped(sampling={"counts": "fixed"})
    output, trace = called(model)
    kept = [stage.decision.sum(1).tolist() for stage in trace.stages]
    total, parts = for_model(model)(X, output, LABELS, trace)
    assert list(parts) == ["classification"]
    total.backward()
    assert all(p.grad is not None for p in model.token_predictors.parameters())
    assert any(bool(p.grad.any()) for p in model.token_predictors.parameters())
    with torch.no_grad():
        _, trace = called(model.eval())
    assert kept == [stage.decision.sum(1).tolist() for stage in trace.stages]
    model.train().set_threshold(0.5)  # each image keeps what it needs, so they are free
    output, trace = called(model)
    assert "ratio" in for_model(model)(X, output, LABELS, trace)[1]


@pytest.mark.parametrize("scorer", ["random", "token-norm"])
def test_scorers_without_parameters_have_no_ratio_term(scorer: str) -> None:
    """They gather in training too: kept tokens are compared with the same ones of the teacher."""
    model = wrapped(scorer=scorer)
    loss = for_model(model, copy.deepcopy(tokenprune.unwrap(model)))
    output, trace = called(model)
    total, parts = loss(X, output, LABELS, trace)
    assert list(parts) == ["classification", "distill_logits", "distill_tokens"]
    dense = wrapped(copy.deepcopy(tokenprune.unwrap(model))).eval()
    with torch.no_grad(), dense.using("dense"):
        full = called(dense)[1].patch_tokens
    kept = trace.stages[-1].keep_indices[..., None].expand_as(trace.patch_tokens)
    wanted = F.mse_loss(trace.patch_tokens, full.gather(1, kept))
    torch.testing.assert_close(parts["distill_tokens"], wanted.detach())
    total.backward()


def test_bypass_has_all_terms() -> None:
    model = wrapped(mode="bypass", schedule={"blocks": [1, 2], "keep_ratio": 0.6})
    loss = for_model(model, copy.deepcopy(tokenprune.unwrap(model)))
    total, parts = loss(X, *(c := called(model))[:1], LABELS, c[1])
    assert list(parts) == ["classification", "ratio", "distill_logits", "distill_tokens"]
    total.backward()


@pytest.mark.parametrize("inputs", [X, (X,), {"x": X}], ids=["a tensor", "several", "by name"])
def test_the_teacher_is_called_as_the_model_was(inputs: Any) -> None:
    model = wrapped(loss={"distill_tokens": 0.0})
    teacher = Vit(1).train()  # any model, if only its logits are read
    loss = for_model(model, teacher)
    output, trace = called(model)
    _, parts = loss(inputs, output, LABELS, trace)
    with torch.no_grad():
        wanted = distill_logits(output, teacher(X))
    torch.testing.assert_close(parts["distill_logits"], wanted)
    assert teacher.training


@pytest.mark.parametrize(
    "shape", [lambda t: t, lambda t: (t, None), lambda t: SimpleNamespace(logits=t)]
)
def test_outputs_of_any_kind(shape: Any) -> None:
    model = wrapped()
    output, trace = called(model)
    probabilities = F.one_hot(LABELS, CLASSES).float()
    ours = for_model(model)(X, shape(output), probabilities, trace)[0]
    torch.testing.assert_close(ours, for_model(model)(X, output, LABELS, trace)[0])


def test_evaluation_has_the_same_terms() -> None:
    model = wrapped().eval()
    loss = for_model(model, copy.deepcopy(tokenprune.unwrap(model)))
    for threshold in (None, 0.5):
        model.set_threshold(threshold)
        output, trace = called(model)
        _, parts = loss(X, output, LABELS, trace)
        assert all(part.isfinite() for part in parts.values())
        assert len(parts) == 4


def test_what_is_missing_is_named() -> None:
    model = wrapped()
    output, trace = called(model)
    loss = for_model(model)
    with pytest.raises(NotWrappedError, match=r"tokenprune\.wrap"):
        for_model(Vit(1))
    with pytest.raises(PlanError, match=r"found NoneType.*return_trace=True"):
        loss(X, output, LABELS, None)  # type: ignore[arg-type]
    with pytest.raises(HostError, match=r"class logits \[B, C\]"):
        loss(X, torch.zeros(3, 4, 5), LABELS, trace)
    for labels, found in [
        ([0, 1, 2], "list"),
        (LABELS[:2], r"int64 tensor \(2,\)"),
        (X, "float32"),
    ]:
        with pytest.raises(PlanError, match=rf"indices \[3\] or probabilities \[3, 5\].*{found}"):
            loss(X, output, labels, trace)  # type: ignore[arg-type]
    assert isinstance(loss.weights, PruningLoss)


def test_a_teacher_with_other_patches_is_refused() -> None:
    model = wrapped()
    loss = for_model(model, copy.deepcopy(tokenprune.unwrap(model)))
    output, trace = called(model)
    with pytest.raises(PlanError, match="not the teacher's"):
        loss(pixels(3, 24), output, LABELS, trace)


def test_the_teacher_of_a_host_whose_blocks_a_graph_shows() -> None:
    model = tokenprune.wrap(Pairs(), example_inputs=IMAGES, verify=False).train()
    output, trace = model(IMAGES, return_trace=True)
    _, parts = for_model(model, Pairs())(IMAGES, output, torch.tensor([0, 1]), trace)
    assert {"distill_logits", "distill_tokens"} <= parts.keys()
