"""The kernels of a stage, predictor and selection, compute what the plain versions do."""

import math

import pytest
import torch

from tokenprune.ops import gather_tokens, select_topk
from tokenprune.ops.kernels import predictor
from tokenprune.ops.kernels.selection import can_select, keep_best
from tokenprune.ops.selection import indices_of, top_k
from tokenprune.scorers import TokenPredictor


@pytest.mark.parametrize(
    ("batch", "patches", "prefix", "dim", "keep"),
    [(2, 7, 1, 5, 3), (1, 37, 0, 9, 36), (3, 33, 2, 3, 1), (2, 40, 1, 4, 40)],
)
def test_the_best_stay_with_ties_nan_and_inf(
    device: torch.device, batch: int, patches: int, prefix: int, dim: int, keep: int
) -> None:
    torch.manual_seed(0)
    score = torch.randn(batch, patches, device=device).round()
    score[0, 2], score[-1, 1], score[0, 3] = math.nan, math.inf, -0.0
    tokens = torch.randn(batch, prefix + patches, dim, device=device)
    numbers = torch.arange(0, 3 * patches, 3, device=device).expand(batch, -1)
    logits = torch.stack([score, -score], -1)
    places = indices_of(top_k(logits, keep), keep)
    assert torch.equal(select_topk(logits, keep), places)
    left, kept = keep_best(tokens, score, numbers, keep, prefix)
    assert torch.equal(left, gather_tokens(tokens, places, prefix))
    assert torch.equal(kept, numbers.gather(1, places))
    assert torch.equal(keep_best(tokens, score, None, keep, prefix)[1], places)


@pytest.mark.parametrize(("batch", "patches", "dim"), [(2, 7, 6), (1, 70, 33)])
def test_the_predictor_is_the_plain_one(
    device: torch.device, batch: int, patches: int, dim: int
) -> None:
    torch.manual_seed(0)
    scorer = TokenPredictor(dim, init_std=0.3).to(device)
    tokens = torch.randn(batch, patches + 1, dim, device=device)[:, 1:] * 2 + 1
    with torch.no_grad():
        found = predictor.keep_logits(tokens, *scorer._plain_weights())
        torch.testing.assert_close(found, scorer(tokens), rtol=1e-4, atol=1e-5)


def test_what_needs_a_gradient_runs_plain(device: torch.device) -> None:
    tokens, score = torch.randn(1, 4, 2, device=device), torch.randn(1, 4, device=device)
    assert can_select(tokens, score)
    assert not can_select(tokens.requires_grad_(), score)
    scorer = TokenPredictor(8).to(device, torch.bfloat16)
    weights, tokens = scorer._plain_weights()[0], torch.randn(1, 4, 8, device=device).bfloat16()
    assert not predictor.can_predict(tokens, weights)
    with torch.no_grad():
        assert predictor.can_predict(tokens, weights)


def test_a_layer_that_is_not_ours_runs_plain() -> None:
    scorer = TokenPredictor(8)
    assert scorer._plain_weights()[0]
    scorer.out_proj[0].register_forward_hook(lambda *_: None)
    assert not scorer._plain_weights()[0]
    assert not TokenPredictor(8, activation="relu")._plain_weights()[0]
