"""Masked softmax: exact over what is visible, with a gradient to what is not."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
