"""The parts of the training loss, against DynamicViT's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.losses import PruningLoss, distill_logits, distill_tokens, ratio_loss

B, N, D, C = 3, 5, 4, 7


def decisions_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, requires_grad=True)


def test_ratio_loss_of_each_image() -> None:
    first = decisions_of([1, 1, 1, 0], [1, 1, 0, 0])
    second = decisions_of([1, 0, 0, 0], [1, 1, 0, 0])
    loss = ratio_loss([first, second], [0.5, 0.25])
    first_stage, second_stage = (0.25**2 + 0) / 2, (0 + 0.25**2) / 2
    assert loss.item() == pytest.approx((first_stage + second_stage) / 2)
    loss.backward()
    assert first.grad is not None
    # d/dD of ((mean - r)^2) / (B S) is 2 (mean - r) / (N B S)
    torch.testing.assert_close(first.grad[0], torch.full((4,), 2 * 0.25 / (4 * 2 * 2)))


def test_ratio_loss_of_the_batch_lets_images_differ() -> None:
    decisions = [decisions_of([1, 1, 1, 1], [0, 0, 0, 0])]
    assert ratio_loss(decisions, [0.5], per_image=False).item() == 0
    assert ratio_loss(decisions, [0.5]).item() == pytest.approx(0.25)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_ratio_loss_needs_every_stage(count: int) -> None:
    with pytest.raises(PlanError, match=rf"found {count} decisions and 2 ratios"):
        ratio_loss([torch.ones(B, N)] * count, [0.7, 0.5])


def test_distill_logits_is_the_divergence_from_the_teacher() -> None:
    student = torch.randn(B, C, requires_grad=True)
    teacher = torch.randn(B, C, requires_grad=True)
    p, q = teacher.softmax(-1), student.softmax(-1)
    wanted = (p * (p / q).log()).sum() / B
    loss = distill_logits(student, teacher)
    torch.testing.assert_close(loss, wanted)
    assert distill_logits(student, student).item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_distill_tokens_looks_at_kept_tokens(kind: str) -> None:
    student, teacher = torch.randn(B, N, D), torch.randn(B, N, D)
    decision = (torch.rand(B, N) < 0.6).float()
    kept = decision > 0.5
    if kind == "mse":
        wanted = F.mse_loss(student[kept], teacher[kept])
        every = F.mse_loss(student, teacher)
    else:
        wanted = distill_logits(student[kept], teacher[kept])
        every = distill_logits(student, teacher)
    torch.testing.assert_close(distill_tokens(student, teacher, decision, kind), wanted)
    torch.testing.assert_close(distill_tokens(student, teacher, None, kind), every)


@given(st.sampled_from(["mse", "kl"]), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_dropped_tokens_do_not_matter_to_distillation(kind: str, garbage: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(B, N, D), torch.randn(B, N, D)
    decision = (torch.rand(B, N) < 0.6).float().requires_grad_()
    dropped = (decision < 0.5)[..., None]
    clean = distill_tokens(student, teacher, decision, kind)
    spoilt = student.masked_fill(dropped, garbage).requires_grad_()
    loss = distill_tokens(spoilt, teacher.masked_fill(dropped, garbage), decision, kind)
    torch.testing.assert_close(loss, clean)
    loss.backward()
    assert spoilt.grad is not None
    assert (spoilt.grad[dropped.expand_as(spoilt)] == 0).all()
    assert spoilt.grad.isfinite().all()
    assert decision.grad is None


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_no_kept_token_is_a_zero_in_the_graph(kind: str) -> None:
    student = torch.randn(B, N, D, requires_grad=True)
    loss = distill_tokens(student, torch.randn(B, N, D), torch.zeros(B, N), kind)
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None
    assert (student.grad == 0).all()


def a_batch() -> dict[str, Tensor]:
    return {
        "teacher_logits": torch.randn(B, C),
        "student_tokens": torch.randn(B, N, D, requires_grad=True),
        "teacher_tokens": torch.randn(B, N, D),
    }


@pytest.mark.parametrize("token_set", ["kept", "all"])
def test_the_whole_is_the_weighted_sum_of_its_parts(token_set: str) -> None:
    decisions = [(torch.rand(B, N) < share).float().requires_grad_() for share in (0.8, 0.5)]
    logits, labels, batch = (
        torch.randn(B, C, requires_grad=True),
        torch.tensor([0, 3, 6]),
        a_batch(),
    )
    loss = PruningLoss(keep_ratios=(0.8, 0.5), token_set=token_set)
    total, parts = loss(logits, labels, decisions, **batch)
    wanted = {
        "classification": F.cross_entropy(logits, labels),
        "ratio": ratio_loss(decisions, (0.8, 0.5)),
        "distill_logits": distill_logits(logits, batch["teacher_logits"]),
        "distill_tokens": distill_tokens(
            batch["student_tokens"],
            batch["teacher_tokens"],
            decisions[-1] if token_set == "kept" else None,
        ),
    }
    assert parts.keys() == wanted.keys()
    for name, part in parts.items():
        torch.testing.assert_close(part, wanted[name].detach())
        assert not part.requires_grad
    weights = {"classification": 1, "ratio": 2, "distill_logits": 0.5, "distill_tokens": 0.5}
    torch.testing.assert_close(total, sum(weights[name] * wanted[name] for name in wanted))
    total.backward()
    for x in (logits, batch["student_tokens"], *decisions):
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


def test_a_weight_of_zero_needs_nothing_and_computes_nothing() -> None:
    loss = PruningLoss(keep_ratios=(), ratio=0, distill_logits=0, distill_tokens=0)
    probabilities = torch.rand(B, C).softmax(-1)
    total, parts = loss(torch.zeros(B, C, dtype=torch.bfloat16), probabilities, [])
    assert list(parts) == ["classification"]
    assert total.item() == pytest.approx(math.log(C))
    assert total.dtype == torch.float32


def test_another_criterion() -> None:
    loss = PruningLoss(
        keep_ratios=(), ratio=0, distill_logits=0, distill_tokens=0, criterion=lambda x, _: x.sum()
    )
    assert loss(torch.ones(B, C), torch.zeros(B), [])[0].item() == B * C


@pytest.mark.parametrize(
    ("missing", "weight"),
    [
        ("teacher_logits", "distill_logits is 0.5, found no teacher_logits"),
        ("student_tokens", "distill_tokens is 0.5, found no student_tokens and teacher_tokens"),
        ("teacher_tokens", "distill_tokens is 0.5, found no student_tokens and teacher_tokens"),
    ],
)
def test_a_part_without_its_tensors(missing: str, weight: str) -> None:
    batch = {name: x for name, x in a_batch().items() if name != missing}
    loss = PruningLoss(keep_ratios=(0.7,))
    with pytest.raises(PlanError, match=weight):
        loss(torch.randn(B, C), torch.tensor([0, 1, 2]), [torch.ones(B, N)], **batch)


def test_the_fields_are_those_of_a_recipe() -> None:
    from tokenprune.recipe.schema import LossSection

    loss = PruningLoss(keep_ratios=(0.7,), **LossSection().model_dump())
    assert loss == PruningLoss(keep_ratios=(0.7,))


def test_the_whole_loss_counts_shares_of_real_tokens() -> None:
    """Half of the tokens are padding; of the others three in four are kept, as they should be."""
    real = torch.arange(8).expand(B, -1) < 4
    decision = (torch.arange(8).expand(B, -1) < 3).float()
    loss = PruningLoss(keep_ratios=(0.75,), classification=0, distill_logits=0, distill_tokens=0)
    assert loss(torch.zeros(B, 2), torch.zeros(B).long(), [decision], real=real)[0].item() == 0
    assert loss(torch.zeros(B, 2), torch.zeros(B).long(), [decision])[0].item() > 0.1
