"""A wrapped model through any order of calls: the promises between them always hold."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import tokenprune
from tokenprune.recipe.counting import num_keep

RECIPE = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.7}}
PATCHES = 16


def build() -> nn.Module:
    torch.manual_seed(0)
    vit = timm.models.vision_transformer.VisionTransformer
    return vit(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()


class Lifecycle(RuleBasedStateMachine):
    """Wrap, train, eval, force paths, change ratios, save, load, copy, unwrap."""

    @initialize()
    def start(self) -> None:
        self.host = build()
        self.model: Any = None
        self.images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        self.ratios = (0.7, 0.49)
        self.dense = self.run(self.host)

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(self.images)
        return out

    @precondition(lambda self: self.model is None)
    @rule()
    def wrap(self) -> None:
        self.model = tokenprune.wrap(self.host, RECIPE, verify=False, train=False).eval()
        self.ratios = (0.7, 0.49)

    @precondition(lambda self: self.model is not None)
    @rule(training=st.booleans())
    def set_mode(self, training: bool) -> None:
        self.model.train(training)

    @precondition(lambda self: self.model is not None)
    @rule(ratio=st.sampled_from([0.3, 0.5, 0.7, 1.0]))
    def set_keep_ratio(self, ratio: float) -> None:
        self.model.set_keep_ratio(ratio)
        self.ratios = (ratio, ratio**2)

    @precondition(lambda self: self.model is not None)
    @rule(seed=st.integers(0, 99))
    def train_a_step(self, seed: int) -> None:
        was = self.model.training
        self.model.train()
        with self.model.using(generator=torch.Generator().manual_seed(seed)):
            out, trace = self.model(self.images, return_trace=True)
        loss = out.square().mean() + sum(stage.decision.mean() for stage in trace.stages)
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= 0.01 * parameter.grad
        self.model.zero_grad()
        self.model.train(was)
        self.dense = self.run_dense()

    @precondition(lambda self: self.model is not None)
    @rule(path=st.sampled_from(["dense", "mask", "gather"]))
    def force_a_path(self, path: str) -> None:
        kept = [torch.arange(8).expand(2, -1), torch.arange(4).expand(2, -1)]
        before = self.run(self.model.eval())
        with self.model.using(path, keep_indices=kept):
            forced = self.run(self.model)
            with self.model.using("mask"):
                masked = self.run(self.model)
        if path == "dense":
            assert torch.equal(forced, self.dense)
        else:
            torch.testing.assert_close(forced, masked, atol=1e-5, rtol=1e-4)
        assert torch.equal(self.run(self.model), before)

    @precondition(lambda self: self.model is not None)
    @rule()
    def save_and_load(self) -> None:
        self.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            saved = tokenprune.save(self.model, Path(folder) / "model")
            host = build()
            loaded = tokenprune.load(saved, host, verify=False).eval()
        assert torch.equal(self.run(loaded), self.run(self.model))
        self.host, self.model = host, loaded

    @precondition(lambda self: self.model is not None)
    @rule()
    def copy_it(self) -> None:
        twin = copy.deepcopy(self.model).eval()
        assert torch.equal(self.run(twin), self.run(self.model.eval()))
        assert tokenprune.unwrap(twin) is not self.host

    @precondition(lambda self: self.model is not None)
    @rule()
    def unwrap(self) -> None:
        assert tokenprune.unwrap(self.model) is self.host
        self.host.eval()
        self.model = None

    def run_dense(self) -> Tensor:
        was = self.model.training
        self.model.eval()
        with self.model.using("dense"):
            out = self.run(self.model)
        self.model.train(was)
        return out

    @invariant()
    def the_host_still_runs_dense(self) -> None:
        was = self.host.training
        self.host.eval()
        assert torch.equal(self.run(self.host), self.dense)
        self.host.train(was)

    @invariant()
    def eval_keeps_what_the_ratios_say(self) -> None:
        if self.model is not None and not self.model.training:
            with torch.no_grad():
                _, trace = self.model(self.images, return_trace=True)
            wanted = [num_keep(PATCHES, ratio) for ratio in self.ratios]
            assert [stage.num_tokens for stage in trace.stages] == wanted

    @invariant()
    def the_state_is_the_hosts_and_the_predictors(self) -> None:
        if self.model is not None:
            keys = list(self.model.state_dict())
            assert len(keys) == len(set(keys))
            rest = [key for key in keys if not key.startswith("token_predictors.")]
            assert rest == list(self.host.state_dict())


TestLifecycle = pytest.mark.slow(Lifecycle.TestCase)
TestLifecycle.settings = settings(max_examples=5, stateful_step_count=10, deadline=None)
