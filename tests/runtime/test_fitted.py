"""The warning of predictors that have learned nothing, and the flag that is saved."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import config

import tokenprune
from tests.toys.table import TOYS
from tokenprune.errors import TokenPruneWarning
from tokenprune.runtime.model import pruning_of

LINES = "`tokenprune.calibrate(model, batches)`", '`tokenprune.wrap(host, "merge-k0.7")`'
pytestmark = pytest.mark.filterwarnings("error", "always:untrained predictors")


TOY = TOYS["prefix_1"]
INPUTS = TOY.inputs()
OPTIONS: Any = {"adapter": TOY.facts, "example_inputs": INPUTS, "verify": False, "train": False}
IMAGES = INPUTS["x"]


def fresh(recipe: Any = TOY.recipe) -> Any:
    torch.manual_seed(0)
    return tokenprune.wrap(TOY.build(), recipe, **OPTIONS)


def said(model: Any) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as given, torch.no_grad():
        warnings.simplefilter("always")
        model(IMAGES)
    assert all(w.category is TokenPruneWarning for w in given)
    return [str(w.message) for w in given]


def train_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(IMAGES).square().mean().backward()
    optimizer.step()
    model.eval()


def test_it_is_said_once_at_the_first_eval_call_and_names_both_ways_out() -> None:
    model = fresh()
    (text,) = said(model)
    assert text.startswith("untrained predictors: ")
    assert all(line in text for line in LINES)
    assert said(model) == []
    assert len(said(copy.deepcopy(model))) == 1  # another model


def test_it_points_at_the_caller() -> None:
    model = fresh()
    with pytest.warns(TokenPruneWarning, match="never trained or calibrated") as given:
        model(IMAGES)
    assert given[0].filename == __file__


def _threshold(model: Any) -> None:
    model.set_threshold(0.5)


def _half(model: Any) -> None:
    model.bfloat16().float()


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _host_weights(model: Any) -> None:
    model.load_state_dict(tokenprune.unwrap(model).state_dict())


@pytest.mark.parametrize("change", [_threshold, _half, _pickled, copy.deepcopy, _host_weights])
def test_what_teaches_nothing_ends_nothing(change: Callable[[Any], Any]) -> None:
    model = fresh()
    assert len(said(change(model) or model)) == 1


def test_a_training_call_says_nothing_and_does_not_count_without_a_step() -> None:
    model = fresh()
    assert said(model.train()) == []
    assert len(said(model.eval())) == 1


def test_a_step_ends_it() -> None:
    model = fresh()
    train_step(model)
    assert said(model) == []
    assert said(copy.deepcopy(model)) == []


def test_an_average_of_trained_weights_counts() -> None:
    model = fresh()
    average = torch.optim.swa_utils.AveragedModel(model)
    train_step(model)
    average.update_parameters(model)
    assert said(average.eval()) == []


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_predictors_count(assign: bool) -> None:
    trained, model = fresh(), fresh()
    train_step(trained)
    model.load_state_dict(trained.state_dict(), assign=assign)
    assert said(model) == []


def test_calibration_sets_the_flag() -> None:
    model = fresh()
    pruning_of(model).fitted = True
    assert said(model) == []
    assert said(copy.deepcopy(model)) == []


@pytest.mark.parametrize("recipe", ["random-k0.7", "token-norm-k0.7", "merge-k0.7"])
def test_scorers_that_learn_nothing_say_nothing(recipe: str) -> None:
    assert said(fresh(recipe=recipe)) == []


def test_calls_that_do_not_prune_by_scores_say_nothing() -> None:
    model = fresh()
    sets = [torch.arange(4).expand(2, -1)] * len(TOY.blocks)
    with model.using("dense"):
        assert said(model) == []
    with model.using(keep_indices=sets):
        assert said(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenprune.verify(model, TOY.inputs())
        tokenprune.profile(model, TOY.inputs())
    model.set_keep_ratio(1.0)
    assert said(model) == []
    model.set_keep_ratio(0.5)
    assert len(said(model)) == 1


def test_a_host_that_keeps_a_grid_is_not_told_to_merge() -> None:
    (text,) = said(fresh({**TOY.recipe, "mode": "bypass"}))
    assert LINES[0] in text
    assert "merge" not in text


def test_the_flag_is_saved(tmp_path: Path) -> None:
    model = fresh()
    for fitted in (False, True):
        folder = tokenprune.save(model, tmp_path / str(fitted))
        facts = json.loads((folder / "tokenprune.json").read_text())
        assert facts["fitted"] is fitted
        loaded = tokenprune.load(folder, TOY.build(), **OPTIONS)
        assert len(said(loaded)) == (not fitted)
        assert pruning_of(loaded).fitted is fitted
        train_step(model)


def test_a_flag_that_calibration_set_is_saved_and_none_means_trained(tmp_path: Path) -> None:
    model = fresh()
    pruning_of(model).fitted = True
    folder = tokenprune.save(model, tmp_path)
    assert said(tokenprune.load(folder, TOY.build(), **OPTIONS)) == []
    facts = json.loads((folder / "tokenprune.json").read_text())
    del facts["fitted"]
    (folder / "tokenprune.json").write_text(json.dumps(facts))
    assert said(tokenprune.load(folder, TOY.build(), **OPTIONS)) == []


def test_a_compiled_call_warns_too_and_stays_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # shape checks break the graph
    model = fresh()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as given, torch.no_grad():
        warnings.simplefilter("always")
        compiled(IMAGES)
        compiled(IMAGES)
        found = sum("untrained predictors" in str(w.message) for w in given)
    assert found == 1
    assert said(model) == []


def test_weights_that_cannot_be_read_say_nothing() -> None:
    model = fresh()
    state = dict(model.named_parameters())

    def call(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "untrained")
        torch.func.vmap(call, in_dims=(None, 0))(state, IMAGES[:, None])
    assert len(said(model)) == 1


def decisions(model: Any, path: str) -> list[torch.Tensor]:
    with warnings.catch_warnings(), model.using(path), torch.no_grad():
        warnings.filterwarnings("ignore", "untrained predictors")
        _, trace = model(IMAGES, return_trace=True)
    return [stage.decision.bool() for stage in trace.stages]


@pytest.mark.parametrize("ratios", [[0.9, 0.5], [0.7, 0.4], [0.8, 0.1]])
def test_equal_scores_leave_the_same_tokens_on_every_path(ratios: list[float]) -> None:
    """What breaks a tie is a token's original number, not its place among those that are left."""
    model = fresh()
    model.set_keep_ratio(ratios)
    masked, gathered = decisions(model, "mask"), decisions(model, "gather")
    for one, other in zip(masked, gathered, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[0], one[1])  # whatever the images hold


def test_the_best_of_equal_scores_is_the_same_on_the_jagged_path() -> None:
    model = fresh()
    first, second = model.token_predictors
    first.small_start, first.init_std = False, 1.0  # images keep different numbers
    with torch.no_grad():
        second.out_proj[-1].bias.copy_(torch.tensor([-1.0, 1.0]))  # drops all but one
    model.set_threshold(0.5)
    for seed in range(8):
        torch.manual_seed(seed)
        first.reset_parameters()
        masked, jagged = decisions(model, "mask"), decisions(model, "gather")
        assert masked[1].sum(1).tolist() == [1, 1]
        for one, other in zip(masked, jagged, strict=True):
            assert torch.equal(one, other)
