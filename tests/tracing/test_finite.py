"""Branches that only values which are not finite take, as the training forward of detectors has."""

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.toys.vit import Block, Vit, pixels
from tokenprune.errors import HostError

X = pixels(2, 16, 0)


class Clamps(Block):
    """Asks in every mode, after tokens have left."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if not torch.isfinite(x).all():
            x = x.clamp(-1e4, 1e4)
        if (torch.isinf(x).any() | x.isnan().any()).item():
            x = x * 0.0
        return x


def test_a_branch_for_values_that_are_not_finite() -> None:
    torch.manual_seed(0)
    host = Vit(block=Clamps)
    model = tokenprune.wrap(host, example_inputs=X)  # fills dropped tokens with NaN and inf
    model(X).sum().backward()
    assert all(p.grad is not None for p in host.parameters())
    model.eval().set_keep_ratio(1.0)
    with torch.no_grad():
        assert torch.equal(model(X), host(X))
        nn.init.constant_(host.blocks[1].mlp[2].bias, float("inf"))
        assert host(X).isfinite().all()
        with pytest.raises(HostError, match=r"asks torch\.isfinite at .*another way.*using\('den"):
            model.train()(X)
        with model.using("dense"):
            assert torch.equal(model(X), host(X))
