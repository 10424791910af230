"""torch's functions while tracing: those whose C code would read a proxy as a tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import TraceError

RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}


def add_number(x: Tensor, by: int) -> Tensor:
    return x + by


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.fc(x)


class Host(nn.Module):
    """Three blocks over [B, 6, 8], with `odd` between the tokens and the blocks."""

    def __init__(self, odd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.odd = odd
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def wrapped(odd: Callable[[Tensor], Tensor]) -> tuple[Host, Any]:
    torch.manual_seed(0)
    host = Host(odd).eval()
    spec = tokenprune.ArchSpec(
        adapter="test", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=0
    )
    x = torch.randn(2, 6, 8)
    return host, tokenprune.wrap(host, RECIPE, example_inputs=x, adapter=spec)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: torch.where(x > 0, x, -1.0),
        lambda x: torch.where(x > 0, torch.zeros((), dtype=x.dtype), x.shape[1] * 0.1),
        lambda x: torch.clamp(x, 0, x.shape[1] - 5),
        lambda x: torch.pow(2.0, x),
        lambda x: torch.remainder(x.shape[1], x.abs() + 1),
        # torch 2.8 looks at the flag before any mode sees the call
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=x.shape[1] < 1),
    ],
    ids=["where", "where_numbers", "clamp", "pow", "remainder", "flag"],
)
def test_a_number_may_stand_where_a_tensor_may(odd: Callable[[Tensor], Tensor]) -> None:
    host, model = wrapped(odd)
    x = torch.randn(3, 6, 8)
    model.set_keep_ratio(1.0)
    assert torch.equal(model(x, return_trace=True)[0], host(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")
def test_scripted_functions_are_traced_through() -> None:
    shifted = torch.jit.script(add_number)
    host, model = wrapped(lambda x: shifted(x, x.shape[1]))
    x = torch.randn(3, 6, 8)
    model.set_keep_ratio(1.0)
    assert torch.equal(model(x, return_trace=True)[0], host(x))
    assert torch.equal(shifted(torch.zeros(1), 2), torch.full((1,), 2.0))  # itself again


def test_a_custom_gradient_is_refused_by_name() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    with pytest.raises(TraceError, match=r"test_functions.*autograd\.Function"):
        wrapped(lambda x: Twice.apply(x))
