"""Modules whose code decides by what tensors hold: one node each."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.tracing.test_functions import RECIPE, Block
from tokenprune.errors import HostError, UnsupportedHostError


class Shift(nn.Module):
    """Adds to each image a row of a table, chosen by the image's number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))
        self.calls = 0

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        scaled = x * self.table.mean()
        rows = [self.table[int(number)] for number in numbers]
        return x + scaled + torch.stack(rows)[:, None]


class Noisy(Shift):
    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x, numbers), 0.2, self.training)


class Shorten(nn.Module):
    """Leaves as many tokens as the first image says."""

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return x[:, : int(numbers[0])]


class Host(nn.Module):
    def __init__(self, odd: nn.Module, inside: bool = False) -> None:
        super().__init__()
        self.odd, self.inside = odd, inside
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        x = x.relu() if self.inside else self.odd(x.relu(), numbers)
        for block in self.blocks:
            x = block(x)
        return (self.odd(x, numbers) if self.inside else x).mean(1)


SPEC = tokenprune.ArchSpec(
    adapter="test", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=0
)


def inputs(batch: int, number: int = 4, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    numbers = torch.arange(batch) % 5 if number < 0 else torch.full((batch,), number)
    return {"x": torch.randn(batch, length, 8, generator=generator), "numbers": numbers}


def wrapped(odd: nn.Module, inside: bool = False) -> tuple[Host, Any]:
    torch.manual_seed(0)
    host = Host(odd, inside).eval()
    return host, tokenprune.wrap(host, RECIPE, example_inputs=inputs(2), adapter=SPEC)


def test_its_dropout_is_no_number_of_pythons() -> None:
    host, model = wrapped(Noisy())
    before = torch.get_rng_state()
    model._pruning.programs(inputs(2, length=7))
    assert torch.equal(torch.get_rng_state(), before)
    model.train()(**inputs(2)).sum().backward()
    assert host.odd.table.grad is not None


def test_it_runs_on_the_values_of_each_call() -> None:
    host, model = wrapped(Shift())
    model.set_keep_ratio(1.0)
    for given in (inputs(2), inputs(2, -1), inputs(3, -1), inputs(5, 1)):
        with torch.no_grad():
            assert torch.equal(model(**given, return_trace=True)[0], host(**given))
    assert model._pruning.cache.info().programs == 2  # eval and training, for all batches
    assert not model._pruning.programs(inputs(3)).analysis.batch_bound


def test_it_is_proven_trained_and_counted() -> None:
    _, model = wrapped(Shift())
    assert tokenprune.verify(model, inputs(3, -1)).mask_vs_gather < 1e-4
    assert tokenprune.profile(model, inputs(3, -1)).macs > 0
    model.train()
    model(**inputs(3, -1)).square().mean().backward()
    assert model.odd.table.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.token_predictors.parameters())


def test_another_shape_than_the_traced_one_is_refused() -> None:
    _, model = wrapped(Shorten())
    assert model(**inputs(3)).shape == (3, 8)
    with pytest.raises(
        HostError, match=r"returned \(2, 5, 8\), but \(B, 4, 8\) when it was traced"
    ):
        model(**inputs(2, 5))


def test_behind_a_block_it_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedHostError, match=r"tokens of which some have left: module 'odd'"):
        wrapped(Shift(), inside=True)
