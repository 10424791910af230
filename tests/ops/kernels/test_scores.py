"""The kernel of a predictor's later layers computes what the layers do."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.scorers import learned
from tokenprune.scorers.learned import TokenPredictor

SIZES = pytest.mark.parametrize(
    ("batch", "patches", "dim", "activation"),
    [(2, 5, 4, "relu"), (1, 70, 40, "gelu"), (2, 5, 200, "silu"), (1, 2, 600, "gelu")],
)


def lively(dim: int, activation: str, dtype: torch.dtype, device: torch.device) -> TokenPredictor:
    torch.manual_seed(0)
    predictor = TokenPredictor(
        dim, activation=activation, init_std=dim**-0.5, dtype=dtype, device=device
    )
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.5) if parameter.ndim == 1 else None
    return predictor


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "can_score", lambda *args: False)


# The interpreter's tl.dot takes bfloat16 for whole numbers.
HALF = (torch.bfloat16, 0.04) if torch.cuda.is_available() else (torch.float16, 0.004)


@SIZES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), HALF])
@pytest.mark.parametrize("filled", [False, True])
def test_scores_are_those_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, batch: int, patches: int, dim: int,
    activation: str, dtype: torch.dtype, bound: float, filled: bool,
) -> None:  # fmt: skip
    from tokenprune.ops.kernels import scores_triton

    monkeypatch.setattr(scores_triton, "FULL", 0 if filled else 128)
    predictor = lively(dim, activation, dtype, device)
    tokens = torch.randn(batch, patches, dim, dtype=dtype, device=device)
    present = (torch.rand(batch, patches, device=device) > 0.3).to(dtype)
    with torch.no_grad():
        fused = [predictor(tokens), predictor(tokens, present)]
        plain(monkeypatch)
        layers = [predictor(tokens), predictor(tokens, present)]
    for ours, theirs in zip(fused, layers, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_a_dropped_token_holds_stays_in_its_row(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    predictor = lively(8, "relu", torch.float32, device)
    tokens, present = torch.randn(2, 6, 8, device=device), torch.ones(2, 6, device=device)
    present[0, 1] = present[1, 4] = 0
    tokens[0, 1, 0] = tokens[1, 4] = value
    with torch.no_grad():
        found = predictor(tokens, present)
        plain(monkeypatch)
        wanted = predictor(tokens, present)
    torch.testing.assert_close(found, wanted)


def test_tokens_that_lie_apart_are_read_in_place(device: torch.device) -> None:
    predictor = lively(8, "gelu", torch.float32, device)
    tokens = torch.randn(2, 7, 16, device=device)[:, 2:, ::2]
    with torch.no_grad():
        torch.testing.assert_close(predictor(tokens), predictor(tokens.contiguous()))
        apart = tokens.contiguous()[:, 1:]
        torch.testing.assert_close(predictor(apart), predictor(apart.contiguous()))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p.out_proj, "3", nn.Tanh()),
        lambda p: setattr(p.out_proj, "1", nn.GELU(approximate="tanh")),
        lambda p: p.out_proj[2].register_forward_hook(lambda *args: args[2] * 2),
        lambda p: setattr(p.out_proj[2], "forward", lambda x: x[..., : p.dim // 4] * 3),
        lambda p: p.out_proj[4].register_parameter("bias", None),
        lambda p: nn.utils.parametrize.register_parametrization(p.out_proj[4], "weight", nn.ReLU()),
        lambda p: p.double(),
    ],
)
def test_other_layers_run_themselves(
    device: torch.device, change: Callable[[TokenPredictor], object]
) -> None:
    predictor = lively(16, "gelu", torch.float32, device)
    change(predictor)
    like = next(predictor.parameters())
    tokens = torch.randn(2, 6, 16, device=device, dtype=like.dtype)
    with torch.no_grad():
        features = predictor.in_proj(tokens)
        shared = features[..., 8:].mean(1, keepdim=True).expand(-1, 6, -1)
        wanted = predictor.out_proj(torch.cat([features[..., :8], shared], -1)).log_softmax(-1)
        torch.testing.assert_close(predictor(tokens), wanted)


def test_layers_that_do_not_fit_each_other_are_an_error(device: torch.device) -> None:
    predictor = lively(16, "gelu", torch.float32, device)
    predictor.out_proj[2] = nn.Linear(12, 4, device=device)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        predictor(torch.randn(2, 6, 16, device=device))


def test_gradients_pass_through_the_layers(device: torch.device) -> None:
    predictor = lively(16, "gelu", torch.float32, device)
    other = copy.deepcopy(predictor).requires_grad_(False)
    tokens = torch.randn(2, 6, 16, device=device, requires_grad=True)
    for one in (predictor, other):
        assert one(tokens)[..., 0].sum().requires_grad


def test_its_flops_are_counted(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    predictor, tokens = lively(16, "gelu", torch.float32, device), torch.randn(2, 6, 16)
    counts = []
    for _ in range(2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            predictor(tokens.to(device))
        counts.append(counter.get_total_flops())
        plain(monkeypatch)
    assert counts[0] == counts[1]
