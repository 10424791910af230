"""Prefix tokens: what a host does with random images before its first block."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.analysis.test_reading import IMAGES, WIDTH, Pairs
from tokenprune.analysis import prefix
from tokenprune.errors import TokenPruneError, TokenPruneWarning, UnsupportedHostError


class Hidden(Pairs):
    """Some patches are hidden from the host: where `hide` is True, or `there` is False."""

    def __init__(self, hidden: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.nothing = hidden, nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.where(self.hidden(mask).unsqueeze(-1), self.nothing, x)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.places
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        y: Tensor = self.head(x[:, 0])
        return y


@pytest.mark.parametrize(
    ("hidden", "of_none"),
    [(torch.clone, False), (torch.logical_not, True)],
    ids=["True hides", "False hides"],
)
def test_a_mask_beside_the_images_leaves_the_prefix_known(
    hidden: Callable[[Tensor], Tensor], of_none: bool
) -> None:
    given = {"x": IMAGES, "mask": torch.full((2, 16), of_none)}
    model = tokenprune.wrap(Hidden(hidden), "token-norm-k0.7", example_inputs=given, train=False)
    assert model._pruning.plan.num_prefix == 2


class Dark(Pairs):
    """Patches that are dark, and those that vary little, are hidden by what they hold."""

    def forward(self, x: Tensor) -> Tensor:
        cut = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(-2).mean(1).flatten(1, 2)
        x = self.embed(x).flatten(2).transpose(1, 2)
        seen = (cut.mean(-1) > 0) & (cut.std(-1) > 0.5)
        x = torch.cat([self.first.expand(len(x), -1, -1), x * seen.unsqueeze(-1)], dim=1)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        y: Tensor = self.head(x[:, 0])
        return y


def test_patches_that_are_hidden_by_what_they_hold_are_patches_in_batches_of_any_size() -> None:
    model = tokenprune.wrap(Dark(), "token-norm-k0.7", example_inputs=IMAGES, train=False)
    assert (model._pruning.plan.num_prefix, model._pruning.plan.num_suffix) == (2, 0)
    images = torch.cat([IMAGES, -IMAGES]).repeat(2, 1, 1, 1)
    for count in (1, 3, 8):
        model(images[:count])
        assert (model._pruning.plan.num_prefix, model._pruning.plan.num_suffix) == (2, 0)


class Amid(Pairs):
    """Registers between the patches."""

    def tokens(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :8], self.first.expand(len(x), -1, -1), x[:, 8:]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        y: Tensor = self.head(x.mean(1))
        return y


def test_own_tokens_among_the_patches_do_not_leave_unless_that_is_said() -> None:
    given: dict[str, Any] = {"example_inputs": IMAGES, "train": False}
    with pytest.raises(UnsupportedHostError, match=r"2 of the tokens.*\(places 8 to 9\)"):
        tokenprune.wrap(Amid(), "merge-k0.7", **given)
    with pytest.warns(TokenPruneWarning, match="mode: bypass: .* 2 of the tokens") as found:
        tokenprune.wrap(Amid(), "token-norm-k0.7", **given)
    advice = re.search(r"ArchSpec\([^)]*\)", str(found[0].message))
    assert advice is not None
    spec = eval(advice[0], {"ArchSpec": tokenprune.ArchSpec})
    model = tokenprune.wrap(Amid(), "token-norm-k0.7", **given, adapter=spec)
    assert (model._pruning.plan.num_prefix, model._pruning.plan.num_suffix) == (0, 0)


class Turned(Pairs):
    """Every other block reads the tokens from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for number, (attention, feed) in enumerate(self.layers):
            x = x.flip(1) if number % 2 else x
            x = attention(x) + x
            x = feed(x) + x
            x = x.flip(1) if number % 2 else x
        y: Tensor = self.head(x[:, 0])
        return y


def test_own_tokens_are_where_a_block_has_them() -> None:
    given: dict[str, Any] = {"example_inputs": IMAGES, "train": False}
    plan = tokenprune.wrap(Turned(), "merge-k0.7", **given)._pruning.plan
    assert (plan.blocks, plan.num_prefix, plan.num_suffix) == ((2,), 2, 0)
    recipe = {"version": 1, "mode": "merge", "schedule": {"blocks": [1], "keep_ratio": 0.7}}
    with pytest.raises(TokenPruneError):  # they would be merged with patches
        tokenprune.wrap(Turned(), recipe, **given)


class Noisy(Pairs):
    """Noise on all tokens in training."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(0)

    def tokens(self, x: Tensor) -> Tensor:
        x = super().tokens(x)
        if self.training:
            x = F.dropout(x + torch.randn(x.shape, generator=self.own), 0.2)
        return x


def test_own_tokens_that_come_in_training_are_counted_whatever_the_noise() -> None:
    host = Noisy()
    model = tokenprune.wrap(host, "merge-k0.7", example_inputs=IMAGES).train()
    model(IMAGES)
    assert model._pruning.plan.num_prefix == 2
    host.first = nn.Parameter(torch.randn(1, 5, WIDTH))
    host.places = nn.Parameter(torch.randn(1, 21, WIDTH))
    state = host.own.get_state()
    _, trace = model(IMAGES, return_trace=True)
    assert model._pruning.plan.num_prefix == 5
    assert [stage.decision.shape for stage in trace.stages] == [(2, 16)] * len(trace.stages)
    once = torch.Generator()
    once.set_state(state)
    torch.randn(2, 21, WIDTH, generator=once)
    assert torch.equal(once.get_state(), host.own.get_state())


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_no_answer(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error("no memory left")

    monkeypatch.setattr(prefix, "evaluate", refuse)
    with pytest.raises(error, match="no memory left"):
        tokenprune.wrap(Pairs(), "token-norm-k0.7", example_inputs=IMAGES, train=False)
