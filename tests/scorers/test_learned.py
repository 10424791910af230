"""The keep / drop predictor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tokenprune.ops.selection import above_threshold
from tokenprune.scorers.learned import TokenPredictor

B, N = 2, 6


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("with_decision", [True, False])
def test_log_probabilities_for_any_width(dim: int, with_decision: bool) -> None:
    decision = torch.ones(B, N) if with_decision else None
    keep_logits = TokenPredictor(dim)(torch.randn(B, N, dim), decision)
    assert keep_logits.shape == (B, N, 2)
    torch.testing.assert_close(keep_logits.exp().sum(-1), torch.ones(B, N))


def test_parameters_lie_where_the_published_checkpoints_have_them() -> None:
    shapes = {name: tuple(p.shape) for name, p in TokenPredictor(16).state_dict().items()}
    assert shapes == {
        "in_proj.0.weight": (16,),
        "in_proj.0.bias": (16,),
        "in_proj.1.weight": (16, 16),
        "in_proj.1.bias": (16,),
        "out_proj.0.weight": (8, 16),
        "out_proj.0.bias": (8,),
        "out_proj.2.weight": (4, 8),
        "out_proj.2.bias": (4,),
        "out_proj.4.weight": (2, 4),
        "out_proj.4.bias": (2,),
    }


def test_initial_weights() -> None:
    predictor = TokenPredictor(256)
    for name, parameter in predictor.named_parameters():
        if name == "in_proj.0.weight":
            assert (parameter == 1).all()
        elif name == "out_proj.4.bias":
            assert parameter.tolist() == [2.0**-22, 0]
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            small = 2.0**-30 / 0.02 if name == "out_proj.4.weight" else 1.0
            assert 0.01 * small < parameter.std() < 0.03 * small


@pytest.mark.parametrize("dim", [8, 192, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_at_the_start_all_scores_are_equal(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    predictor = TokenPredictor(dim, dtype=dtype)
    tokens = (torch.randn(B, 50, dim) * torch.logspace(-3, 3, 50)[:, None]).to(dtype)
    assert predictor.is_fresh()
    scores = predictor(tokens)
    assert (scores == scores[0, 0]).all()
    assert above_threshold(scores, 0.5).all()
    assert (above_threshold(scores, 0.501).sum(1) == 1).all()
    assert (scores.exp() - 0.5).abs().max() < 2e-7


def test_the_first_gradient_reaches_every_layer_and_a_step_ends_the_start() -> None:
    torch.manual_seed(0)
    predictor = TokenPredictor(16)
    predictor(torch.randn(B, N, 16))[..., 0].square().sum().backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
    torch.optim.SGD(predictor.parameters(), lr=1e-6).step()
    assert not predictor.is_fresh()
    predictor.reset_parameters()
    assert predictor.is_fresh()
    predictor.out_proj[-1].bias.data[0] = 1e-3
    assert not predictor.is_fresh()
    assert not TokenPredictor(16, small_start=False).is_fresh()


def test_half_of_the_channels_are_shared_by_all_tokens() -> None:
    predictor = TokenPredictor(6)
    tokens, decision = torch.randn(1, N, 6), torch.ones(1, N)
    decision[0, 2:] = 0
    features = predictor.in_proj(tokens)
    both = [features[..., :3], features[:, :2, 3:].mean(1, keepdim=True).expand(1, N, 3)]
    wanted = predictor.out_proj(torch.cat(both, dim=-1)).log_softmax(-1)
    torch.testing.assert_close(predictor(tokens, decision), wanted)


def test_all_kept_is_no_decision() -> None:
    predictor, tokens = TokenPredictor(6), torch.randn(B, N, 6)
    torch.testing.assert_close(predictor(tokens, torch.ones(B, N)), predictor(tokens))


@given(st.permutations(range(N)))
def test_it_does_not_know_the_order_of_tokens(order: list[int]) -> None:
    torch.manual_seed(0)
    predictor = TokenPredictor(6, init_std=0.5, small_start=False)
    tokens, decision = torch.randn(B, N, 6), (torch.rand(B, N) < 0.6).float()
    torch.testing.assert_close(
        predictor(tokens[:, order], decision[:, order]), predictor(tokens, decision)[:, order]
    )


def spoilt_tokens(
    garbage: float,
) -> tuple[TokenPredictor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A predictor, tokens, the same with garbage in dropped ones, and the decision."""
    torch.manual_seed(0)
    tokens = torch.randn(B, N, 6)
    decision = torch.tensor([[1.0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0]], requires_grad=True)
    spoilt = tokens.masked_fill((decision < 0.5)[..., None], garbage)
    return TokenPredictor(6, init_std=0.5, small_start=False), tokens, spoilt, decision


@given(st.sampled_from([math.inf, -math.inf, math.nan, 1e30]))
def test_contents_of_dropped_tokens_do_not_matter(garbage: float) -> None:
    predictor, tokens, spoilt, decision = spoilt_tokens(garbage)
    kept = decision > 0.5
    torch.testing.assert_close(predictor(spoilt, decision)[kept], predictor(tokens, decision)[kept])


@given(st.sampled_from([math.inf, -math.inf, math.nan]))
def test_gradients_are_finite_whatever_dropped_tokens_hold(garbage: float) -> None:
    predictor, _, spoilt, decision = spoilt_tokens(garbage)
    predictor(spoilt, decision).square().sum().backward()
    for parameter in (*predictor.parameters(), decision):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_kept_tokens_agree_with_the_gather_path() -> None:
    predictor, tokens = TokenPredictor(6, init_std=0.5, small_start=False), torch.randn(B, N, 6)
    keep_indices = torch.tensor([[0, 3, 4], [1, 2, 5]])
    rows = torch.arange(B)[:, None]
    decision = torch.zeros(B, N)
    decision[rows, keep_indices] = 1
    gathered = predictor(tokens[rows, keep_indices])
    torch.testing.assert_close(predictor(tokens, decision)[rows, keep_indices], gathered)


def test_nothing_kept_and_the_gradient_of_the_mean() -> None:
    predictor = TokenPredictor(6, init_std=0.5, small_start=False)
    decision = torch.zeros(B, N, requires_grad=True)
    keep_logits = predictor(torch.randn(B, N, 6), decision)
    assert keep_logits.isfinite().all()
    keep_logits[..., 0].sum().backward()
    assert decision.grad is not None
    assert decision.grad.isfinite().all()
    assert decision.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_softmax_is_wide_in_low_precision(dtype: torch.dtype) -> None:
    tokens, decision = torch.randn(B, N, 8), torch.ones(B, N)
    with torch.autocast("cpu", dtype=dtype):
        assert TokenPredictor(8)(tokens, decision).dtype == torch.float32
    predictor = TokenPredictor(8, dtype=dtype)
    keep_logits = predictor(tokens.to(dtype), decision)
    assert keep_logits.dtype == torch.float32
    torch.testing.assert_close(keep_logits.exp().sum(-1), torch.ones(B, N))


def test_the_activation_and_a_new_start() -> None:
    predictor = TokenPredictor(8, activation="relu")
    assert sum(isinstance(module, torch.nn.ReLU) for module in predictor.modules()) == 3
    before = predictor.in_proj[1].weight.clone()
    predictor.reset_parameters()
    assert not torch.equal(before, predictor.in_proj[1].weight)


def test_an_image_is_scored_alone() -> None:
    torch.manual_seed(0)
    predictor, tokens = TokenPredictor(8, init_std=1.0, small_start=False), torch.randn(3, 5, 8)
    decision = (torch.rand(3, 5) > 0.4).float()
    together = predictor(tokens, decision)
    for image in range(3):
        alone = predictor(tokens[image : image + 1], decision[image : image + 1])
        torch.testing.assert_close(alone[0], together[image])


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_a_first_layer_that_was_replaced_or_hooked_is_called(dim: int) -> None:
    """Quantisation, adapters and pruning tools put something else there, or hook it."""
    predictor, tokens = TokenPredictor(dim), torch.randn(B, N, dim)
    decision = (torch.arange(N) < 3).float().expand(B, -1)
    wanted = predictor(tokens, decision)
    calls: list[int] = []
    handle = predictor.out_proj[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(predictor(tokens, decision), wanted)
    assert calls == [1]
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    other = Doubled(dim, predictor.out_proj[0].out_features)
    other.load_state_dict(predictor.out_proj[0].state_dict())
    predictor.out_proj[0] = other
    doubled = predictor(tokens, decision)
    predictor.out_proj[0] = nn.Linear(dim, other.out_features)
    with torch.no_grad():
        predictor.out_proj[0].weight.copy_(2 * other.weight)
        predictor.out_proj[0].bias.copy_(2 * other.bias)
    torch.testing.assert_close(doubled, predictor(tokens, decision))
