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
    places = indices_of(top_k(logits, keep), keep)
    assert torch.equal(select_topk(logits, keep), places)
    left, kept = keep_best(tokens, score, numbers, keep, prefix)
    assert torch.equal(left, gather_tokens(tokens, places, prefix))
    assert torch.equal(kept, numbers.gather(1, places))
    assert torch.equal(keep_best(tokens, score, None, keep, prefix)[1], places)


def test_what_needs_a_gradient_runs_plain(device: torch.device) -> None:
    tokens, score = torch.randn(1, 4, 2, device=device), torch.randn(1, 4, device=device)
    assert can_select(tokens, score)
    assert not can_select(tokens.requires_grad_(), score)
