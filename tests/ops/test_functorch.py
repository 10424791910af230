"""The operators under torch.func: the same gradients, for each image alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from tokenprune.ops import hide_dropped, masked_attention, masked_softmax

B, H, L, D = 3, 2, 5, 4


def fused(q: Tensor, k: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    return masked_attention(q, k, k + 1, policy, attn_mask=bias)


def without_mask(q: Tensor, k: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    return masked_attention(q, k, k + 1, policy, own_key=False) + bias.sum()


def spelled_out(q: Tensor, k: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    weights = masked_softmax(q @ k.mT + bias, policy, query_dim=2)
    return weights @ hide_dropped(k, policy, 2)


FUNCTIONS: list[Callable[..., Tensor]] = [fused, without_mask, spelled_out]


def operands(batch: int = B) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k = (torch.randn(batch, H, L, D, dtype=torch.float64) for _ in range(2))
    policy = (torch.rand(batch, L) > 0.4).double()
    return q, k, policy, torch.randn(1, H, L, L, dtype=torch.float64)


def one(function: Any, w: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, policy, bias: (function(q[None], k[None], policy[None], bias) * w).sum()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_gradients_of_each_image(function: Callable[..., Tensor]) -> None:
    given = operands()
    w = torch.randn(H, L, D, dtype=torch.float64)
    found = vmap(grad(one(function, w), argnums=(0, 1, 2, 3)), (0, 0, 0, None))(*given)
    for i in range(B):
        alone = [x[i].requires_grad_() for x in given[:3]] + [given[3].requires_grad_()]
        wanted = torch.autograd.grad(one(function, w)(*alone), alone)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_other_dims_may_be_mapped(function: Callable[..., Tensor]) -> None:
    q, k, policy, bias = operands()
    several = torch.stack([q, q * 2], -1)
    out = vmap(function, (-1, None, None, None))(several, k, policy, bias)
    assert out.shape == (2, B, H, L, D)
    for i in range(2):
        torch.testing.assert_close(out[i], function(several[..., i], k, policy, bias))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_gradients_of_a_mask_that_all_images_share(function: Callable[..., Tensor]) -> None:
    q, k, policy, bias = operands()
    several = torch.stack([q, q * 2])
    run = grad(lambda q, bias: function(q, k, policy, bias).square().sum(), argnums=1)
    found = vmap(run, (0, None))(several, bias)
    for i in range(2):
        torch.testing.assert_close(found[i], run(several[i], bias))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_jacobian(function: Callable[..., Tensor]) -> None:
    q, k, policy, bias = operands(1)
    found = jacrev(lambda q: function(q, k, policy, bias).sum((1, 2)))(q)
    wanted = torch.autograd.functional.jacobian(
        lambda q: function(q, k, policy, bias).sum((1, 2)), q
    )
    torch.testing.assert_close(found, wanted)


def test_masked_softmax_is_differentiable_once() -> None:
    scores = torch.randn(2, L, L, requires_grad=True)
    out = masked_softmax(scores, torch.ones(2, L), 2)
    (found,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_no_image(function: Callable[..., Tensor]) -> None:
    given = [x.requires_grad_() for x in operands(0)]
    out = function(*given)
    assert out.shape == (0, H, L, D)
    assert all(not found.any() for found in torch.autograd.grad(out.sum(), given))
