"""Masked softmax: exact over what is visible, with a gradient to what is not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.errors import LeakError
from tokenprune.ops import masked_softmax


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int | None]:
    """Scores of some rank, a policy, the key dim and the query dim."""
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rank = draw(st.integers(2, 4))
    dims = draw(st.permutations(range(1, rank)))
    shape = [batch, *draw(st.lists(st.integers(1, 3), min_size=rank - 1, max_size=rank - 1))]
    dim, query_dim = dims[0], None
    shape[dim] = keys
    if rank > 2 and draw(st.booleans()):
        query_dim = dims[1]
        shape[query_dim] = keys
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = scores * draw(st.sampled_from([1.0, 50.0]))
    policy = (torch.rand(batch, keys, generator=generator) < draw(st.floats(0, 1))).double()
    return scores, policy, dim - draw(st.sampled_from([0, rank])), query_dim


def hidden_from(scores: Tensor, policy: Tensor, dim: int, query_dim: int | None) -> Tensor:
    """True at hidden keys, in the shape of the scores."""
    dim %= scores.ndim
    hidden = (policy < 0.5).reshape(
        len(policy), *(policy.shape[1] if d == dim else 1 for d in range(1, scores.ndim))
    )
    hidden = hidden.expand(scores.shape).clone()
    if query_dim is not None:
        hidden.diagonal(dim1=query_dim, dim2=dim).fill_(False)
    return hidden


@given(cases())
def test_it_is_softmax_with_minus_infinity_at_hidden_keys(
    case: tuple[Tensor, Tensor, int, int | None],
) -> None:
    scores, policy, dim, query_dim = case
    hidden = hidden_from(*case)
    wanted = scores.masked_fill(hidden, -math.inf).softmax(dim).nan_to_num(0.0)
    found = masked_softmax(scores, policy, dim, query_dim=query_dim)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (found[hidden] == 0).all()


@given(cases(), st.sampled_from([math.inf, -math.inf, math.nan, 1e300]))
def test_scores_of_hidden_keys_do_not_matter(
    case: tuple[Tensor, Tensor, int, int | None], garbage: float
) -> None:
    scores, policy, dim, query_dim = case
    clean = masked_softmax(scores, policy, dim, query_dim=query_dim)
    spoilt = scores.masked_fill(hidden_from(*case), garbage).requires_grad_()
    found = masked_softmax(spoilt, policy.requires_grad_(), dim, query_dim=query_dim)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    (found * torch.randn_like(found)).sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


@given(cases())
def test_gradients_follow_the_formulas(case: tuple[Tensor, Tensor, int, int | None]) -> None:
    scores, policy, dim, query_dim = case
    hidden = hidden_from(*case)
    visible = scores.masked_fill(hidden, -math.inf)
    lse = visible.logsumexp(dim, keepdim=True)
    p = visible.softmax(dim).nan_to_num(0.0)
    upstream = torch.randn_like(scores)
    flow = upstream - (p * upstream).sum(dim, keepdim=True)
    weight = torch.where(lse == -math.inf, 1.0, (scores - lse).clamp(max=0).exp())
    to_policy = weight * flow
    if query_dim is not None:
        to_policy.diagonal(dim1=query_dim, dim2=dim).zero_()
    dims = [d for d in range(1, scores.ndim) if d != dim % scores.ndim]
    found = torch.autograd.grad(
        masked_softmax(scores.requires_grad_(), policy.requires_grad_(), dim, query_dim=query_dim),
        (scores, policy),
        upstream,
    )
    wanted = (p * flow, to_policy.sum(dims) if dims else to_policy)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@given(cases())
def test_for_a_kept_key_it_is_the_derivative_of_the_weighted_softmax(
    case: tuple[Tensor, Tensor, int, int | None],
) -> None:
    """D_j e^{s_j} / sum_k D_k e^{s_k}, which is smooth in D where D is 1."""
    scores, policy, dim, _ = case
    upstream = torch.randn_like(scores)
    policy = torch.ones_like(policy).requires_grad_()
    shape = [1] * scores.ndim
    shape[0], shape[dim] = policy.shape
    weighted = policy.reshape(shape) * (scores - scores.amax(dim, keepdim=True)).exp()
    smooth = weighted / weighted.sum(dim, keepdim=True)
    (wanted,) = torch.autograd.grad(smooth, policy, upstream)
    (found,) = torch.autograd.grad(masked_softmax(scores, policy, dim), policy, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


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

    def note(x: Tensor) -> Tensor:
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
