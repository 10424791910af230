"""flex_attention, opened up: the same bits as torch's own, and a host that calls it is pruned."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tokenprune
from tests.toys.vit import HEADS, Attention, Block, Vit, pixels, randomize_weights
from tokenprune.errors import TokenPruneWarning
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.flex import attend

Options = Callable[[int], dict[str, Any]]
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated"),
]
BIAS = torch.randn(HEADS, 17, 17, generator=torch.Generator().manual_seed(1))
SLOPES = torch.tensor([0.5, 0.25])


def masked(mask_mod: Callable[..., Tensor]) -> Options:
    return lambda length: {
        "block_mask": create_block_mask(mask_mod, None, None, length, length, device="cpu")
    }


CASES: dict[str, Options] = {
    "plain": lambda length: {},
    "scale": lambda length: {"scale": 0.1},
    "bias": lambda length: {"score_mod": lambda s, b, h, q, k: s + BIAS[h, q, k]},
    "alibi": lambda length: {"score_mod": lambda s, b, h, q, k: s - SLOPES[h] * (q - k).abs()},
    "cap": lambda length: {"score_mod": lambda s, b, h, q, k: 2 * torch.tanh(s / 2)},
    "window": masked(lambda b, h, q, k: (q - k).abs() <= 3),
    "rows_that_see_nothing": masked(lambda b, h, q, k: (q < 9) & (k > 2)),
    "neighbours_alone": masked(lambda b, h, q, k: (q - k).abs() == 1),
}


class Flex(Attention):
    options: Options
    call = staticmethod(flex_attention)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        return self.call(q, k, v, **self.options(q.shape[2]))


@pytest.mark.parametrize("name", ["bias", "window", "rows_that_see_nothing", "neighbours_alone"])
def test_wrap_proves_a_host_that_calls_it(name: str) -> None:
    host, images = flex_host(CASES[name]), pixels(2, 16)
    alone = name == "neighbours_alone"  # if those leave, some tokens see nothing
    warned = pytest.warns(TokenPruneWarning, match="mode: bypass") if alone else nullcontext()
    with torch.no_grad(), warned:  # torch has no gradient of it on a CPU
        model = tokenprune.wrap(host, example_inputs=images, train=False)
    mode = "bypass" if alone else "remove"
    assert pruning_of(model).method.reduction.name == mode


def test_a_compiled_one_runs_its_python_code() -> None:
    images = pixels(2, 16)
    host = flex_host(CASES["plain"], torch.compile(flex_attention, backend="eager"))
    with torch.no_grad():
        model = tokenprune.wrap(host, example_inputs=images, train=False)
        assert model(images).isfinite().all()
    assert pruning_of(model).method.reduction.name == "remove"


@pytest.mark.parametrize("name", CASES)
def test_it_rounds_as_torch_does(name: str) -> None:
    q, k, v = torch.randn(3, 2, HEADS, 17, 8, generator=torch.Generator().manual_seed(0))
    more = CASES[name](17) | {"return_lse": True}
    expected, ours = flex_attention(q, k, v, **more), attend(q, k, v, **more)
    assert all(map(torch.equal, ours, expected))


def test_it_rounds_as_torch_does_with_fewer_heads_of_keys() -> None:
    q = torch.randn(2, 4, 17, 8, generator=torch.Generator().manual_seed(0))
    k, v = q[:, :2] + 1, q[:, 2:] - 1
    for precision in (torch.float32, torch.float64, torch.bfloat16):
        given = [t.to(precision) for t in (q, k, v)]
        expected = flex_attention(*given, enable_gqa=True)
        found = attend(*given, enable_gqa=True)
        if precision is torch.bfloat16 and torch.__version__ < "2.9":  # it rounds once more there
            torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
        else:
            assert torch.equal(found, expected)  # type: ignore[arg-type]


def flex_host(options: Options, call: Any = flex_attention) -> Vit:
    own = {"options": staticmethod(options), "call": staticmethod(call)}
    attention = type("Flex", (Flex,), own)
    torch.manual_seed(0)
    host = Vit(prefix=0, block=lambda: Block(attention)).eval()
    randomize_weights(host, 3.0)
    return host
