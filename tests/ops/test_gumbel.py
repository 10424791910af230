"""Sampled decisions: nested, reproducible, finite, with the gradient of the soft sample."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.ops import sample_decision, sample_topk

EXTREME = st.sampled_from([0.0, -1.0, 1e4, -1e30, 3e38, math.inf, -math.inf, math.nan])
SEED = st.integers(0, 2**31)


@given(st.lists(st.tuples(EXTREME, EXTREME), min_size=1, max_size=8), SEED, st.booleans())
def test_no_logits_make_nan(pairs: list[tuple[float, float]], seed: int, hard: bool) -> None:
    keep_logits = torch.tensor([pairs], requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    decision = sample_decision(
        keep_logits, torch.ones(1, len(pairs)), hard=hard, temperature=0.01, generator=generator
    )
    assert ((decision >= 0) & (decision <= 1)).all()
    decision.sum().backward()
    assert keep_logits.grad is not None
    assert keep_logits.grad.isfinite().all()


@given(SEED, st.integers(1, 4))
def test_decisions_are_nested_and_what_was_dropped_stays_dropped(seed: int, stages: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decision = torch.ones(2, 20)
    for _ in range(stages):
        previous = decision
        keep_logits = torch.randn(2, 20, 2, generator=generator)
        keep_logits[previous == 0] = math.nan  # what a dropped token says must not matter
        decision = sample_decision(keep_logits, previous, generator=generator)
        assert set(decision.unique().tolist()) <= {0.0, 1.0}
        assert (decision <= previous).all()


@given(SEED)
def test_a_generator_decides_and_leaves_the_global_noise_alone(seed: int) -> None:
    keep_logits, previous = torch.zeros(2, 30, 2), torch.ones(2, 30)
    before = torch.get_rng_state()
    one, other = (
        sample_decision(keep_logits, previous, generator=torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


@given(SEED, st.floats(0.2, 5))
def test_the_hard_sample_has_the_gradient_of_the_soft_one(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep_logits = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    keep_logits.requires_grad_()
    previous = torch.ones(2, 5, dtype=torch.float64)
    upstream = torch.randn(2, 5, dtype=torch.float64)
    samples = {
        hard: sample_decision(
            keep_logits,
            previous,
            temperature=temperature,
            hard=hard,
            generator=torch.Generator().manual_seed(seed),
        )
        for hard in (True, False)
    }
    assert torch.equal(samples[True], (samples[False] >= 0.5).double())
    hard, soft = (torch.autograd.grad(samples[h], keep_logits, upstream)[0] for h in (True, False))
    torch.testing.assert_close(hard, soft)
    wanted = upstream * samples[False] * (1 - samples[False]) / temperature
    torch.testing.assert_close(soft, torch.stack([wanted, -wanted], dim=-1))


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


@given(SEED, st.integers(1, 12))
def test_a_fixed_count_is_kept_of_those_that_are_there(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    previous = (torch.rand(3, 12, generator=generator) > 0.3).float()
    keep_logits = torch.randn(3, 12, 2, generator=generator)
    keep_logits[previous == 0] = math.nan
    decision = sample_topk(keep_logits, previous, count, generator=generator)
    assert set(decision.unique().tolist()) <= {0.0, 1.0}
    assert (decision <= previous).all()
    assert torch.equal(decision.sum(1), previous.sum(1).clamp_max(count))


def test_a_fixed_count_draws_the_likely_more_often_and_learns() -> None:
    keep_logits = torch.tensor([[2.0, -2.0], [0.0, 0.0], [0.0, 0.0], [-2.0, 2.0]])
    keep_logits = keep_logits.expand(4000, 4, 2).clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    decision = sample_topk(keep_logits, torch.ones(4000, 4), 2, generator=generator)
    share = decision.detach().mean(0)
    assert share[0] > 0.9
    assert share[3] < 0.1
    assert abs(float(share[1] - share[2])) < 0.05
    (decision * torch.tensor([0.0, 1.0, 0.0, 0.0])).sum().backward()
    assert keep_logits.grad is not None
    assert bool((keep_logits.grad[:, 1, 0] > 0).all())
    assert float(keep_logits.grad[:, 2].abs().max()) == 0
    keep_logits = keep_logits.detach()
    soft = sample_topk(keep_logits, torch.ones(4000, 4), 2, hard=False, generator=generator)
    assert 0 < float(soft.min()) < float(soft.max()) < 1
