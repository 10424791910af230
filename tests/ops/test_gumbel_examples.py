"""The distribution and the types of sampled decisions."""

import pytest
import torch

from tokenprune.ops import sample_decision


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_class_0_is_kept_as_often_as_it_is_likely(keep: float) -> None:
    keep_logits = torch.tensor([keep, 1 - keep]).log().expand(1, 20000, 2)
    generator = torch.Generator().manual_seed(0)
    decision = sample_decision(keep_logits, torch.ones(1, 20000), generator=generator)
    assert abs(decision.mean().item() - keep) < 0.012  # above three standard deviations


def test_the_noise_is_new_for_each_token_and_image() -> None:
    decision = sample_decision(torch.zeros(4, 64, 2), torch.ones(4, 64))
    assert len(decision.unique(dim=0)) == 4
    assert 0 < decision.mean() < 1


@pytest.mark.parametrize("hard", [True, False])
def test_what_is_dropped_stays_dropped(hard: bool) -> None:
    previous = torch.tensor([[1.0, 0.0, 0.5]])
    keep_logits = torch.tensor([1e4, -1e4]).expand(1, 3, 2)
    assert torch.equal(sample_decision(keep_logits, previous, hard=hard), previous)


def test_earlier_stages_get_a_gradient_through_later_ones() -> None:
    previous = torch.ones(1, 8, requires_grad=True)
    decision = sample_decision(torch.zeros(1, 8, 2), previous)
    (grad,) = torch.autograd.grad(decision.sum(), previous)
    assert torch.equal(grad, decision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sampled_in_fp32_whatever_comes_in(dtype: torch.dtype) -> None:
    keep_logits = torch.randn(2, 50, 2).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decision = sample_decision(
            keep_logits, torch.ones(2, 50), generator=torch.Generator().manual_seed(3)
        )
    wide = sample_decision(
        keep_logits.float(), torch.ones(2, 50), generator=torch.Generator().manual_seed(3)
    )
    assert decision.dtype == torch.float32
    assert torch.equal(decision, wide)
    decision.sum().backward()
    assert keep_logits.grad is not None
    assert keep_logits.grad.dtype == dtype
