"""Pooling without a policy, its types and its refusals."""

import pytest
import torch

from tokenprune.errors import LeakError
from tokenprune.ops import (
    hide_dropped,
    masked_amax,
    masked_contraction_operand,
    masked_mean,
    masked_sum,
)

ALL = [hide_dropped, masked_contraction_operand, masked_sum, masked_mean, masked_amax]


def test_without_a_policy_everything_is_the_hosts() -> None:
    x = torch.randn(2, 5, 3)
    assert hide_dropped(x, None, 1) is x
    assert masked_contraction_operand(x, None, 1) is x
    assert torch.equal(masked_sum(x, None, 1), x.sum(1))
    assert torch.equal(masked_mean(x, None, 1, keepdim=True), x.mean(1, keepdim=True))
    assert torch.equal(masked_amax(x, None, -1), x.amax(-1))


@pytest.mark.parametrize("operator", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_stays_and_sums_do_not_overflow(operator: object, dtype: torch.dtype) -> None:
    x = torch.full((2, 300, 3), 300.0, dtype=dtype)
    policy = torch.ones(2, 300)
    policy[:, 1:3] = 0
    out = operator(x, policy, 1)
    assert out.dtype == dtype
    if operator is masked_mean:  # the sum, 89400, is more than fp16 holds
        assert torch.equal(out, torch.full((2, 3), 300.0, dtype=dtype))


def test_a_maximum_teaches_the_policy_nothing() -> None:
    policy = torch.ones(2, 5, requires_grad=True)
    x = torch.randn(2, 5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(masked_amax(x, policy, 1).sum(), policy, allow_unused=True)
    assert grad is None


def test_a_mean_of_nothing_still_teaches() -> None:
    policy = torch.zeros(2, 5, requires_grad=True)
    x = torch.randn(2, 5, 3)
    masked_mean(x, policy, 1).sum().backward()
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, x.sum(2))


@pytest.mark.parametrize("operator", ALL)
def test_a_policy_of_other_tokens(operator: object) -> None:
    with pytest.raises(LeakError, match=r"shape \[2, 5\] .* found \[2, 4\]"):
        operator(torch.randn(2, 5, 3), torch.ones(2, 4), 1)
    with pytest.raises(LeakError, match="along dim 0 of a tensor of rank 3"):
        operator(torch.randn(2, 5, 3), torch.ones(2, 2), 0)
