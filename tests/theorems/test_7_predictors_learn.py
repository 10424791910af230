"""Theorem 7 of docs/theorems.md: every predictor parameter learns, and seeds repeat."""

import torch
from hypothesis import given

from tests.theorems.case import SEED, Case, fewer, step, tensors
from tokenprune.scorers.protocol import PREDICTORS

# The maximum over no token is a constant, and a sample may drop all 16 tokens of an image.
CONSTANT_OF_NOTHING = {"max_first", "max_values"}


@fewer
@given(seed=SEED)
def test_7_every_predictor_parameter_learns(case: Case, seed: int) -> None:
    case.start(seed)
    step(case, case.toy.inputs(3, seed=seed), seed)
    for name, parameter in getattr(case.model, PREDICTORS).named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    for predictor in getattr(case.model, PREDICTORS):
        local, shared = predictor.in_proj[1].weight.grad.tensor_split([predictor.dim // 2])
        assert local.any()
        assert shared.any()  # the mean over kept tokens teaches too


@fewer
@given(seed=SEED)
def test_7_the_task_teaches_every_decision(case: Case, seed: int) -> None:
    case.start(seed)
    case.model.train()
    with case.model.using(generator=torch.Generator().manual_seed(seed)):
        output, trace = case.model(**case.toy.inputs(3, seed=seed), return_trace=True)
    loss = torch.stack([t.float().square().mean() for t in tensors(output)]).sum()
    grads = torch.autograd.grad(loss, [stage.decision for stage in trace.stages])
    kept = trace.stages[-1].decision.flatten(1).any(dim=1)
    taught = kept if case.toy.name in CONSTANT_OF_NOTHING else torch.ones_like(kept)
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert torch.equal(grad.flatten(1).any(dim=1), taught)  # in every image


@fewer
@given(seed=SEED)
def test_7_the_same_seed_gives_the_same_trace(case: Case, seed: int) -> None:
    case.start(seed)
    inputs = case.toy.inputs(3, seed=seed)
    state = torch.get_rng_state()
    traces = [step(case, inputs, s)[1] for s in (seed, seed, seed + 1)]
    if not case.toy.noisy:  # the noise of decisions comes from the generator alone
        assert torch.equal(torch.get_rng_state(), state)
    ours, again, other = (
        [t for stage in trace.stages for t in (stage.keep_logits, stage.decision)]
        for trace in traces
    )
    same = [torch.equal(a, b) for a, b in zip(ours, again, strict=True)]
    # dropout in the host draws from the global state, so later stages may differ there
    assert all(same[:2] if case.toy.noisy else same)
    assert not torch.equal(ours[1], other[1])
