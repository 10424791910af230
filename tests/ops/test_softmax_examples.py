"""Types, arguments and memory of masked softmax."""

import pytest
import torch

from tokenprune.errors import LeakError
from tokenprune.ops import masked_softmax

POLICY = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])


def test_without_a_policy_it_is_the_host_to_the_last_bit() -> None:
    scores = torch.randn(2, 4, 3)
    assert torch.equal(masked_softmax(scores, None, 1), scores.softmax(1))
    assert masked_softmax(scores, None, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_type_of_the_result(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 4, 3).to(dtype).requires_grad_()
    assert masked_softmax(scores, POLICY).dtype == dtype
    asked = masked_softmax(scores, POLICY, dtype=torch.float32)
    assert asked.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_softmax(scores, POLICY)
        assert out.dtype == scores.softmax(-1).dtype
    out.sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == dtype


def test_nothing_visible_is_nothing() -> None:
    scores = torch.randn(2, 4, 3, requires_grad=True)
    policy = POLICY.clone().requires_grad_()
    out = masked_softmax(scores, policy)
    assert torch.equal(out[1], torch.zeros(4, 3))
    upstream = torch.randn(2, 4, 3)
    to_scores, to_policy = torch.autograd.grad(out, (scores, policy), upstream)
    assert torch.equal(to_scores[1], torch.zeros(4, 3))
    # A key that came back alone would get all of the weight.
    torch.testing.assert_close(to_policy[1], upstream[1].sum(0))


def test_a_dropped_key_that_scores_nan_or_minus_infinity_learns_nothing() -> None:
    scores = torch.randn(2, 4, 3)
    scores[0, :, 1] = torch.nan
    scores[1, :, 2] = -torch.inf
    policy = POLICY.clone().requires_grad_()
    out = masked_softmax(scores, policy)
    (grad,) = torch.autograd.grad(out, policy, torch.randn(2, 4, 3))
    assert grad[0, 1] == grad[1, 2] == 0
    assert (grad != 0).sum() == 4


def test_each_query_sees_itself() -> None:
    out = masked_softmax(torch.randn(2, 5, 3, 3), POLICY, -1, query_dim=-2)
    torch.testing.assert_close(out[1], torch.eye(3).expand(5, 3, 3))
    assert (out[0, :, 0, 1] == 0).all()
    assert (out[0, :, 1, 1] > 0).all()


def test_one_tensor_of_scores_is_kept() -> None:
    kept: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    scores = torch.randn(2, 4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        masked_softmax(scores, POLICY.clone().requires_grad_())
    assert sorted(kept) == [POLICY.numel(), scores.numel()]


@pytest.mark.parametrize("dim", [0, 3, -4])
def test_the_batch_is_no_token_dim(dim: int) -> None:
    with pytest.raises(LeakError, match=rf"along dim {dim} .* from 1 to 2"):
        masked_softmax(torch.randn(2, 4, 3), POLICY, dim)


def test_query_dim_needs_a_query_for_each_key() -> None:
    with pytest.raises(LeakError, match=r"query_dim=1 .*\(2, 4, 3\).* pass query_dim=None"):
        masked_softmax(torch.randn(2, 4, 3), POLICY, -1, query_dim=1)


def test_a_policy_of_other_tokens() -> None:
    with pytest.raises(LeakError, match=r"shape \[2, 4\] .* found \[2, 3\]"):
        masked_softmax(torch.randn(2, 3, 4), POLICY)
