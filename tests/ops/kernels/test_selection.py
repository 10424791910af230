"""The selection kernel computes what the plain version does."""

import math

import pytest
import torch

from tokenprune.ops import gather_tokens, select_topk
from tokenprune.ops.kernels.selection import can_select, keep_best
from tokenprune.ops.selection import indices_of, top_k


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
    places = indices_of(top_k(logits, keep, numbers), keep)
    assert torch.equal(select_topk(logits, keep, numbers), places)
    left, kept = keep_best(tokens, score, numbers, keep, prefix)
    assert torch.equal(left, gather_tokens(tokens, places, prefix))
    assert torch.equal(kept, numbers.gather(1, places))
    own = select_topk(logits, keep)
    assert torch.equal(keep_best(tokens, score, None, keep, prefix)[1], own)


@pytest.mark.parametrize("keep", [1, 11, 39])
def test_equal_scores_are_spread(device: torch.device, keep: int) -> None:
    score, tokens = torch.zeros(2, 40, device=device), torch.randn(2, 40, 3, device=device)
    numbers = torch.stack([torch.arange(40) * 5, torch.arange(40) * 7 + 1]).to(device)
    for given in (None, numbers):
        places = select_topk(torch.stack([score, score], -1), keep, given)
        kept = places if given is None else given.gather(1, places)
        left, found = keep_best(tokens, score, given, keep, 0)
        assert torch.equal(found, kept)
        assert torch.equal(left, gather_tokens(tokens, places, 0))


def test_what_needs_a_gradient_runs_plain(device: torch.device) -> None:
    tokens, score = torch.randn(1, 4, 2, device=device), torch.randn(1, 4, device=device)
    assert can_select(tokens, score)
    assert not can_select(tokens.requires_grad_(), score)
