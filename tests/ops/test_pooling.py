"""Pooling over the kept tokens is pooling after the others have left."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.errors import LeakError
from tokenprune.ops import (
    hide_dropped,
    masked_amax,
    masked_contraction_operand,
    masked_mean,
    masked_sum,
)

GARBAGE = st.sampled_from([math.inf, -math.inf, math.nan, 1e300])
POOLS = {masked_sum: Tensor.sum, masked_mean: Tensor.mean, masked_amax: Tensor.amax}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A tensor, a policy and the token dim."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    dim = draw(st.integers(1, len(shape) - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    policy = torch.rand(shape[0], shape[dim], generator=generator) < draw(st.floats(0, 1))
    return x, policy.double(), dim - draw(st.sampled_from([0, len(shape)]))


def at_dropped(x: Tensor, policy: Tensor, dim: int) -> Tensor:
    """True at dropped tokens, in the shape of `x`."""
    dropped = torch.zeros(x.shape, dtype=torch.bool).movedim(dim, 1)
    dropped[policy < 0.5] = True
    return dropped.movedim(1, dim)


@given(cases(), st.sampled_from(list(POOLS)), st.booleans(), GARBAGE)
def test_it_is_the_pool_of_the_kept(
    case: tuple[Tensor, Tensor, int], pool: object, keepdim: bool, garbage: float
) -> None:
    x, policy, dim = case
    spoilt = x.masked_fill(at_dropped(*case), garbage).requires_grad_()
    found = pool(spoilt, policy.requires_grad_(), dim, keepdim)
    for image, row in enumerate(policy):
        here = found[image : image + 1]
        kept = x[image : image + 1].index_select(dim, (row > 0.5).nonzero()[:, 0])
        if row.sum() == 0:
            assert torch.equal(here, torch.zeros_like(here))
        else:
            torch.testing.assert_close(here, POOLS[pool](kept, dim, keepdim=keepdim))
    (to_x,) = torch.autograd.grad(found.sum(), spoilt, retain_graph=True)
    assert (to_x[at_dropped(*case)] == 0).all()
    assert to_x.isfinite().all()


@given(cases())
def test_the_policy_gets_the_gradient_of_the_weighted_sum_and_mean(
    case: tuple[Tensor, Tensor, int],
) -> None:
    x, policy, dim = case
    policy.requires_grad_()
    front = x.movedim(dim, 1)
    weight = policy.reshape(*policy.shape, *(1 for _ in front.shape[2:]))
    upstream = torch.randn_like(front[:, 0])
    weighted = (front * weight).sum(1)
    (wanted,) = torch.autograd.grad(weighted, policy, upstream, retain_graph=True)
    (found,) = torch.autograd.grad(masked_sum(x, policy, dim), policy, upstream)
    torch.testing.assert_close(found, wanted)
    if (policy.sum(1) > 0).all():
        (wanted,) = torch.autograd.grad(weighted / weight.sum(1), policy, upstream)
        (found,) = torch.autograd.grad(masked_mean(x, policy, dim), policy, upstream)
        torch.testing.assert_close(found, wanted)


@given(cases(), GARBAGE)
def test_an_operand_holds_zeros_for_dropped_tokens(
    case: tuple[Tensor, Tensor, int], garbage: float
) -> None:
    x, policy, dim = case
    dropped = at_dropped(*case)
    operand = masked_contraction_operand(x.masked_fill(dropped, garbage), policy, dim)
    assert torch.equal(operand, x.masked_fill(dropped, 0))


@given(cases(), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_only_what_is_not_finite_is_hidden(
    case: tuple[Tensor, Tensor, int], garbage: float
) -> None:
    x, policy, dim = case
    dropped = at_dropped(*case)
    broken = torch.rand_like(x) < 0.5
    spoilt = x.masked_fill(broken, garbage).requires_grad_()
    found = hide_dropped(spoilt, policy, dim)
    wanted = x.masked_fill(broken & dropped, 0).masked_fill(broken & ~dropped, garbage)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    (to_x,) = torch.autograd.grad(found, spoilt, torch.ones_like(x))
    assert torch.equal(to_x, torch.ones_like(x).masked_fill(broken & dropped, 0))


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
