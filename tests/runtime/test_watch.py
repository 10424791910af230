"""Warnings about training: the kept share, and predictors that do not learn."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenprune
from tests.toys.table import TOYS
from tests.toys.vit import pixels
from tokenprune.errors import TokenPruneWarning
from tokenprune.runtime import watch as watch_file
from tokenprune.runtime.watch import Watch

LABELS = torch.tensor([0, 1, 2, 3])
Loss = Callable[[Any, Tensor], Tensor]


@cache
def _fresh() -> Any:
    torch.manual_seed(0)
    return TOYS["prefix_1"].wrap(verify=False).train()


def wrapped() -> Any:
    """A model of which nothing has been seen yet."""
    torch.manual_seed(0)
    return copy.deepcopy(_fresh())


def plain(model: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), LABELS)


def with_trace(model: Any, x: Tensor) -> Tensor:
    output, _ = model(x, return_trace=True)
    return F.cross_entropy(output, LABELS)


def with_ratio(model: Any, x: Tensor) -> Tensor:
    output, trace = model(x, return_trace=True)
    return tokenprune.losses.for_model(model)(x, output, LABELS, trace)[0]


def train(
    model: Any, loss: Loss, steps: int, parameters: Any = None, rate: float = 1e-2
) -> list[str]:
    """Texts of the warnings of a training run."""
    optimizer = torch.optim.AdamW(parameters or model.parameters(), rate)
    x = pixels(4, 16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            loss(model, x).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(issubclass(w.category, TokenPruneWarning) for w in seen)
    assert all(w.filename == __file__ for w in seen)
    return [str(w.message) for w in seen]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every 5 calls."""
    monkeypatch.setattr(watch_file, "EVERY", 5)
    monkeypatch.setattr(watch_file, "STILL", 2)


@pytest.mark.slow
def test_a_loop_without_the_ratio_term_is_told_once() -> None:
    (text,) = train(wrapped(), plain, 130)
    assert "ratio term" in text
    assert "keep ratios are [0.60, 0.36]" in text
    assert "output, trace = model(x, return_trace=True)" in text
    assert "loss = tokenprune.losses.for_model(model)" in text
    assert "total, parts = loss(x, output, labels, trace)" in text


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_a_loop_with_the_ratio_term_is_not_warned(ratio: float) -> None:
    model = wrapped()
    model.set_keep_ratio(ratio)
    assert train(model, with_ratio, 150) == []


@pytest.mark.usefixtures("hurried")
def test_one_warning_a_model() -> None:
    model = wrapped()
    model.set_keep_ratio(0.9)
    assert len(train(model, plain, 15)) == 1
    assert train(model, plain, 15) == []
    assert len(train(copy.deepcopy(model), plain, 15)) == 1


@pytest.mark.usefixtures("hurried")
def test_a_share_at_its_target_is_no_reason_to_warn() -> None:
    model = wrapped()
    model.set_keep_ratio([0.5, 0.25])
    assert train(model, plain, 15, rate=1e-6) == []


@pytest.mark.usefixtures("hurried")
def test_a_gap_that_does_not_grow_is_no_reason_where_the_trace_is_read() -> None:
    model = wrapped()
    model.set_keep_ratio(0.9)
    assert train(model, with_trace, 15, rate=1e-6) == []


def observed(watch: Watch, model: Any, share: float, traced: bool, calls: int) -> None:
    for _ in range(calls):
        decision = torch.full((2, 10), share, requires_grad=True)
        watch.saw(model, model.token_predictors, [decision], None, [0.5], traced)
        decision.sum().backward()
    with torch.no_grad():
        next(model.token_predictors.parameters()).add_(1.0)


@pytest.mark.usefixtures("hurried")
def test_a_gap_that_grows_is_noticed_though_the_trace_is_read() -> None:
    watch, model = Watch(), wrapped()
    observed(watch, model, 0.6, True, 5)
    observed(watch, model, 0.62, True, 5)
    with pytest.warns(TokenPruneWarning, match="ratio term"):
        observed(watch, model, 0.8, True, 5)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("shares", [(0.9, 0.8, 0.7, 0.6), (0.9, 0.9, 0.9, 0.9)])
def test_a_gap_that_closes_slowly_is_not_warned(shares: tuple[float, ...]) -> None:
    watch, model = Watch(), wrapped()
    for share in shares:
        observed(watch, model, share, True, 5)


@pytest.mark.usefixtures("hurried")
def test_predictors_that_no_optimizer_has() -> None:
    model = wrapped()
    (text,) = train(model, plain, 20, tokenprune.unwrap(model).parameters())
    assert "have not changed" in text
    assert "optimizer" in text


@pytest.mark.usefixtures("hurried")
def test_frozen_predictors() -> None:
    model = wrapped()
    model.token_predictors.requires_grad_(False)
    (text,) = train(model, plain, 20)
    assert "requires_grad_(True)" in text


@pytest.mark.usefixtures("hurried")
def test_calls_without_a_backward_pass_are_no_training() -> None:
    model, x = wrapped(), pixels(4, 16)
    for _ in range(20):
        model(x)
    with torch.no_grad():
        for _ in range(20):
            model(x)
    assert model._pruning.watch.looks == 0


def test_nothing_is_kept_of_transforms() -> None:
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(watch_file._observable(x))
        return x.square().sum()

    torch.func.grad(square)(torch.ones(2, 3))
    square(torch.ones(2, 3))
    with torch.no_grad():
        square(torch.ones(2, 3))
    square(torch.ones(2, 3, device="meta"))
    assert seen == [False, True, False, False]


def test_what_is_kept_can_be_copied() -> None:
    model, x = wrapped(), pixels(4, 16)
    model(x)
    assert copy.deepcopy(model)._pruning.watch.calls == 1
    assert pickle.loads(pickle.dumps(model._pruning.watch)).calls == 1


def test_shares_count_real_tokens() -> None:
    decision = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    real = torch.tensor([[True, True, True, False]])
    assert watch_file._share(decision, real).item() == pytest.approx(2 / 3)


def test_models_that_learn_nothing_are_not_watched() -> None:
    recipe = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}, "scorer": "random"}
    toy = TOYS["prefix_1"]
    model = tokenprune.wrap(toy.build(), recipe, adapter=toy.facts, example_inputs=toy.inputs())
    model.train()(pixels(4, 16)).sum().backward()
    assert model._pruning.watch.calls == 0
