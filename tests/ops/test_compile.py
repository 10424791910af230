"""The operators inside torch.compile, without graph breaks and with the same gradients."""

from collections.abc import Callable

import pytest
import torch
from jaxtyping import config
from torch import Tensor

from tokenprune.ops import (
    hide_dropped,
    masked_amax,
    masked_attention,
    masked_mean,
    masked_softmax,
    sample_decision,
)

pytestmark = pytest.mark.slow
B, H, L, D = 2, 3, 5, 4


@pytest.fixture(autouse=True)
def _no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the annotations, which only tests put there, break the graph."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


def attention(x: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    return masked_attention(x, x * 2, x + 1, policy, attn_mask=bias)


def attention_under_autocast(x: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return masked_attention(x, x * 2, x + 1, policy, attn_mask=bias, own_key=False)


def attention_of_views(x: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    query, key, value = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, x * 2, x + 1))
    return masked_attention(query, key, value, policy, attn_mask=bias)


def spelled_out(x: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    return masked_softmax(x @ x.mT + bias, policy, query_dim=2) @ hide_dropped(x, policy, 2)


def pooled(x: Tensor, policy: Tensor, bias: Tensor) -> Tensor:
    return masked_mean(x + bias[..., :D], policy, 2) - masked_amax(x, policy, 2)


@pytest.mark.parametrize(
    "function",
    [attention, attention_under_autocast, attention_of_views, spelled_out, pooled],
    ids=lambda f: f.__name__,
)
def test_compiled_is_the_same(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(B, H, L, D, requires_grad=True)
    policy = torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], requires_grad=True)
    bias = torch.randn(1, H, L, L, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        out = run(x, policy, bias)
        grads = torch.autograd.grad(out.float().square().sum(), (x, policy, bias))
        results.append((out.detach(), *grads))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


def test_another_batch_size_needs_no_other_code() -> None:
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 4):
            x, policy = torch.randn(batch, H, L, D), torch.ones(batch, L)
            bias = torch.randn(batch, 1, L, L)
            torch.testing.assert_close(compiled(x, policy, bias), attention(x, policy, bias))


def test_sampling_compiles() -> None:
    torch.compiler.reset()
    compiled = torch.compile(sample_decision, fullgraph=True, backend="aot_eager")
    decision = compiled(torch.randn(2, 50, 2), torch.ones(2, 50))
    assert set(decision.unique().tolist()) == {0.0, 1.0}
