"""Theorem 6 of docs/theorems.md: nothing is NaN or inf, whatever is decided."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.theorems.case import FACTORS, Case, step
from tests.toys.table import TOYS
from tokenprune.scorers.protocol import PREDICTORS


def set_decisions(model: Any, stages: Sequence[int], amount: float) -> None:
    """Bias the predictors of some stages: a large positive amount keeps every token."""
    with torch.no_grad():
        for stage in stages:
            getattr(model, PREDICTORS)[stage].out_proj[-1].bias.copy_(
                torch.tensor([amount, -amount])
            )


def assert_finite(case: Case, output: list[Tensor]) -> None:
    assert all(torch.isfinite(t).all() for t in output)
    for name, parameter in case.model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    for name, parameter in getattr(case.model, PREDICTORS).named_parameters():
        assert parameter.grad is not None, name


# Of the decisions of both stages: all dropped, all kept, and kept by the first only.
DECISIONS = {"random": (0.0, 0.0), "none": (-1e4, -1e4), "all": (1e4, 1e4), "first": (1e4, -1e4)}


# Sampled decisions with attention weights of both scales, each of the others with one.
STEPS = (*zip(DECISIONS, (1.0, 50.0, 1.0, 50.0), strict=True), ("random", 50.0))


def test_6_nothing_is_nan_for_any_decision(case: Case) -> None:
    for seed, (decisions, factor) in enumerate(STEPS):
        amounts = DECISIONS[decisions]
        case.start(seed, factor)
        for stage, amount in enumerate(amounts):
            set_decisions(case.model, [stage], amount)
        output, trace = step(case, case.toy.inputs(2, seed=seed), seed)
        if decisions == "none":
            assert all(stage.decision.sum() == 0 for stage in trace.stages)
        if decisions == "all":
            assert all(stage.decision.min() == 1 for stage in trace.stages)
        assert all(torch.isfinite(stage.keep_logits).all() for stage in trace.stages)
        assert_finite(case, output)


LOW = ("eager", "rope_by_length", "mean_and_max")
LOW_PRECISION = pytest.mark.parametrize(
    "case", [TOYS[name] for name in LOW], indirect=True, ids=LOW
)


@LOW_PRECISION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_6_nothing_is_nan_under_autocast(case: Case, dtype: torch.dtype) -> None:
    for seed, decisions in enumerate(DECISIONS.values()):
        case.start(seed, FACTORS[seed % 2])
        for stage, amount in enumerate(decisions):
            set_decisions(case.model, [stage], amount)
        with torch.autocast("cpu", dtype=dtype):
            output, _ = step(case, case.toy.inputs(2, seed=seed), seed)
        assert_finite(case, output)
