"""Noise that is spread over the tokens: decisions of training are those of eval."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.ops import select_topk
from tokenprune.ops.gumbel import sample_decision
from tokenprune.ops.selection import above_threshold, tie_order, top_k
from tokenprune.ops.spread import spread_decision, with_spread_noise

SEED = st.integers(0, 2**20)


def logits(seed: int, patches: int = 12, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, patches, 2, generator=generator) * scale).log_softmax(-1)


def test_it_is_distributed_as_random_noise_is() -> None:
    same = torch.zeros(1, 4096, 2).log_softmax(-1)
    noise = with_spread_noise(same)
    margin = (noise[..., 0] - noise[..., 1])[0].sort().values
    places = (torch.arange(4096) + 0.5) / 4096
    torch.testing.assert_close(margin.sigmoid(), places, atol=1e-3, rtol=0)
    unsure = torch.tensor([1.0, 0.0]).log_softmax(-1).expand(1, 4096, 2)
    drawn = sample_decision(unsure, torch.ones(1, 4096), generator=torch.Generator().manual_seed(0))
    kept = spread_decision(unsure, torch.ones(1, 4096))
    assert abs(float(kept.mean()) - 1 / (1 + math.exp(-1))) < 1e-3
    assert abs(float(kept.mean() - drawn.mean())) < 0.02


def test_scores_that_say_nothing_keep_what_ties_keep() -> None:
    same = torch.zeros(1, 50, 2).log_softmax(-1)
    order = tie_order(torch.arange(50)).topk(20).indices.sort().values
    assert select_topk(with_spread_noise(same), 20)[0].tolist() == order.tolist()


@given(SEED, st.integers(1, 12), st.floats(1e-3, 30.0))
def test_decisions_are_those_of_eval(seed: int, count: int, scale: float) -> None:
    scores = logits(seed, scale=scale).requires_grad_()
    previous = torch.ones(3, 12)
    best = top_k(with_spread_noise(scores.detach()), count)
    decision = spread_decision(scores, previous, best)
    assert torch.equal(decision.detach().bool(), best)
    free = spread_decision(scores, previous)
    threshold = above_threshold(with_spread_noise(scores.detach()), 0.5)
    some = threshold.sum(1) > 1  # eval keeps one token in any case
    assert torch.equal(free.detach().bool()[some], threshold[some])
    (decision + free).square().sum().backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
    assert float(scores.grad.abs().max()) > 0


@given(SEED)
def test_a_token_gets_its_noise_wherever_it_lies(seed: int) -> None:
    scores, generator = logits(seed), torch.Generator().manual_seed(seed)
    numbers = torch.stack([torch.randperm(12, generator=generator)[:7].sort().values] * 3)
    numbers[:, -1] = torch.where(numbers[:, -1] == 11, -1, numbers[:, -1])  # padding
    index = numbers.clamp_min(0).unsqueeze(-1).expand(-1, -1, 2)
    found = with_spread_noise(scores.gather(1, index), numbers)
    expected = with_spread_noise(scores).gather(1, index)
    assert torch.equal(found[numbers >= 0], expected[numbers >= 0])


def test_dropped_tokens_stay_dropped_whatever_they_hold() -> None:
    scores, previous = logits(0).requires_grad_(), torch.ones(3, 12)
    previous[:, ::2] = 0
    broken = torch.where(previous[..., None] == 0, torch.nan, scores)
    chosen = top_k(with_spread_noise(broken).masked_fill(previous[..., None] == 0, -math.inf), 4)
    for best in (None, chosen):
        decision = spread_decision(broken, previous, best)
        assert (decision <= previous).all()
        decision.sum().backward(retain_graph=True)
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
