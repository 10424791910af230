"""Budgets: the share of the dense MACs that was asked for, or what is possible."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.toys.vit import randomize_weights
from tokenprune.cost.budget import threshold_for
from tokenprune.errors import PlanError
from tokenprune.runtime.model import pruning_of

SIZE = 64


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    given |= {"num_classes": 5, "dynamic_img_size": True}
    host = timm.models.vision_transformer.VisionTransformer(**{**given, **options}).eval()
    randomize_weights(host, 2.0)
    return host


def images(batch: int = 4, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def wrapped(name: str, **options: Any) -> Any:
    return tokenprune.wrap(vit(**options), name, verify=False, train=False).eval()


@pytest.mark.parametrize("name", ["dynamicvit-k0.7", "tome-r13", "evit-k0.7", "merge-falling-k0.7"])
def test_the_share_is_met(name: str) -> None:
    model = wrapped(name)
    for macs in (0.85, 0.55):
        share = model.set_budget(macs)
        assert abs(share - macs) < 0.01
        assert tokenprune.profile(model).ratio == pytest.approx(share)
    ratios = pruning_of(model).budget.keep_ratios
    assert ratios == tuple(sorted(ratios, reverse=True))
    assert model.set_budget(1.0) == 1.0
    with torch.no_grad():
        assert torch.equal(model(images()), pruning_of(model).host(images()))


def test_the_form_of_a_schedule_stays() -> None:
    model = wrapped("tome-r13")
    model.set_budget(0.6)
    counts = (256, *pruning_of(model).budget.counts([256] * 4))
    leave = [before - after for before, after in pairwise(counts)]
    assert max(leave) - min(leave) <= 1
    model = wrapped("dynamicvit-k0.7")
    model.set_budget(0.6)
    first, second, third = pruning_of(model).budget.keep_ratios
    assert (second, third) == pytest.approx((first**2, first**3))


def test_it_is_saved_and_other_sizes_keep_the_same_shares(tmp_path: Path) -> None:
    model = wrapped("merge-k0.7")
    model.set_budget(0.6)
    loaded = tokenprune.load(tokenprune.save(model, tmp_path / "m"), vit(), verify=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
        _, small = loaded(images(size=32), return_trace=True)
        _, large = loaded(images(), return_trace=True)
    stages = zip(small.stages, large.stages, strict=True)
    shares = [(s.num_tokens / 64, t.num_tokens / 256) for s, t in stages]
    assert all(abs(one - other) < 1 / 64 for one, other in shares)


@pytest.mark.parametrize("macs", [0, -0.5, 1.2, "0.5", float("nan")])
def test_what_is_no_share_is_refused(macs: Any) -> None:
    model = wrapped("merge-k0.7")
    with pytest.raises(PlanError, match=r"give a share of the dense host's MACs in \(0, 1\]"):
        model.set_budget(macs)


def test_the_least_is_said_and_nothing_changes() -> None:
    model = wrapped("merge-k0.7")
    before = pruning_of(model).budget
    with pytest.raises(PlanError, match=r"the least that this model can do is 0\.\d+, with .* \["):
        model.set_budget(0.1)
    assert pruning_of(model).budget is before


def test_a_threshold_is_found_whose_mean_cost_is_the_budget(tmp_path: Path) -> None:
    model = wrapped("dynamicvit-k0.7")
    randomize_weights(model.token_predictors, 2.0)  # so that keep probabilities differ
    given = [images(8), (images(4), torch.zeros(4))]
    share = model.set_budget(0.7, images=given)
    costs = tokenprune.ImageMacs(model)
    with torch.no_grad():
        parts = [costs(model(x, return_trace=True)[1]) for x in (images(8), images(4))]
    mean = float(torch.cat(parts).mean()) / costs.dense
    assert mean == pytest.approx(share)
    assert abs(share - 0.7) < 0.01
    assert len({int(c) for c in parts[0]}) > 1  # images cost what they need
    with pytest.raises(PlanError, match="the least that this model can do is"):
        model.set_budget(0.05, images=given)
    threshold = pruning_of(model).budget.threshold
    loaded = tokenprune.load(tokenprune.save(model, tmp_path / "m"), vit(), verify=False)
    assert pruning_of(loaded).budget.threshold == threshold
    model.set_budget(0.7)
    assert pruning_of(model).budget.threshold is None


def test_thresholds_need_probabilities_that_differ() -> None:
    with pytest.raises(PlanError, match="scores of Similarity are no probabilities"):
        wrapped("merge-k0.7").set_budget(0.7, images=images())
    model = wrapped("dynamicvit-k0.7")
    with torch.no_grad():
        for predictor in model.token_predictors:
            predictor.out_proj[-1].weight.zero_()
    before = pruning_of(model).budget
    with pytest.raises(PlanError, match=r"no threshold gives that .* have not learned"):
        threshold_for(model, 0.7, images(), None)
    assert pruning_of(model).budget is before
