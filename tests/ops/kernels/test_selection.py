"""The selection kernel computes what the plain version does."""

import math

import pytest
import torch

from tokenprune.ops import gather_tokens, select_topk
from tokenprune.ops.kernels.packing import place_rows
from tokenprune.ops.kernels.selection import can_select, keep_above, keep_best, take_rows
from tokenprune.ops.selection import above_threshold, indices_of, kept_first, top_k
from tokenprune.ops.varlen import places_of


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


@pytest.mark.parametrize(("batch", "patches", "prefix"), [(3, 7, 1), (1, 40, 0), (5, 33, 2)])
@pytest.mark.parametrize("least", [-0.5, 9.0])
def test_what_is_above_a_score_stays_packed(
    device: torch.device, batch: int, patches: int, prefix: int, least: float
) -> None:
    torch.manual_seed(1)
    score = torch.randn(batch, patches, 2, device=device).round()[..., 0] - 1
    score[0, 2], score[-1, 1] = math.nan, math.inf
    numbers = torch.arange(0, 3 * patches, 3, device=device).repeat(batch, 1)
    numbers[0, 5:] = -1
    logits = torch.stack([score, -score], -1)
    for given in (None, numbers):
        there = None if given is None else given >= 0
        wanted = above_threshold(logits, math.exp(least), there, None, given)
        places, kept, counts = keep_above(score, given, least)
        assert torch.equal(counts, wanted.sum(1))
        assert torch.equal(places, kept_first(wanted))
        own = torch.arange(patches, device=device).expand(batch, -1) if given is None else given
        assert torch.equal(kept, own.gather(1, places.clamp_min(0)).where(places >= 0, -1))
        longest = int(counts.max())
        cut = places[:, :longest]
        total = int(counts.sum()) + batch * prefix
        how = (counts, longest, total, prefix)
        placed = place_rows(*how)
        for found, expected in zip(placed, places_of(*how), strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
        tokens = torch.randn(batch, prefix + patches, 5, device=device)
        padded = gather_tokens(tokens, cut.clamp_min(0), prefix).flatten(0, 1)
        taken = take_rows(tokens, cut, placed[2], total, prefix)
        assert torch.equal(taken, padded.index_select(0, placed[0]))


def test_what_needs_a_gradient_runs_plain(device: torch.device) -> None:
    tokens, score = torch.randn(1, 4, 2, device=device), torch.randn(1, 4, device=device)
    assert can_select(tokens, score)
    assert not can_select(tokens.requires_grad_(), score)
