"""`verify` on batches of other sizes than the one that was traced."""

import pytest
import torch

import tokenprune
from tests.zoo.hosts import plain_vit


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_is_proven(batch: int) -> None:
    model = tokenprune.wrap(
        plain_vit(), {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
    )
    certificate = tokenprune.verify(model, torch.randn(batch, 3, 32, 32))
    assert all(check.passed for check in certificate.checks)
