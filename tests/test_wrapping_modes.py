"""`wrap` tries training mode too: what fails there is known before the first step."""

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import tokenprune
from tests.toys.vit import Vit, pixels
from tokenprune.errors import TokenPruneWarning, TraceError, VerificationError
from tokenprune.hosts.spec import ArchSpec

RECIPE = {"version": 1, "schedule": {"blocks": [0, 2], "keep_ratio": 0.6}}
BLOCKS = tuple(f"blocks.{i}" for i in range(3))
SPEC = ArchSpec(adapter="toy", blocks=BLOCKS, num_prefix_tokens=1, norm="norm")
X = pixels(2, 16, 0)


class Drops(Vit):
    """Skips its head by Python's generator in one mode."""

    mode = True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.training is not self.mode or random.random() < 0.5 else out * 2


def wrapped(host: nn.Module, **options: Any) -> Any:
    return tokenprune.wrap(host, RECIPE, example_inputs=X, adapter=SPEC, verify=False, **options)


def test_a_host_in_eval_mode_that_cannot_train_warns_and_serves() -> None:
    host = Drops().eval()
    with pytest.warns(TokenPruneWarning, match=r"Drops cannot run in training.*random\(\) < 0.5"):
        model = wrapped(host)
    assert not host.training
    assert model(X).shape == (2, 5)
    with pytest.raises(TraceError, match="Python draws from Python's random"):
        model.train()(X)


def test_a_host_in_training_mode_that_cannot_train_is_refused() -> None:
    host = Drops().train()
    with pytest.raises(TraceError, match="Python draws from Python's random"):
        wrapped(host)
    assert host.training


def test_a_host_that_cannot_serve_is_refused() -> None:
    host = Drops().train()
    host.mode = False
    with pytest.raises(TraceError, match="Python draws from Python's random"):
        wrapped(host)


def test_the_training_trace_can_be_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = wrapped(Drops().eval(), train=False)
    assert model._pruning.cache.info().programs == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_first_training_step_traces_no_more(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(Vit().train(training))
    assert model.training is training
    assert [m.training for m in model.modules()] == [training] * len(list(model.modules()))
    monkeypatch.setattr("tokenprune.runtime.pruning.trace_call", None)
    model.train()(torch.cat([X, X])).sum().backward()
    model.eval()(X)
    assert model._pruning.cache.info().programs == 2


def test_a_number_of_chunks_is_named() -> None:
    """Python makes a number of how many times an MLP runs, four tokens each time."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
    config = BertConfig(**sizes, num_hidden_layers=3, chunk_size_feed_forward=4)
    given = {"example_inputs": {"input_ids": torch.arange(32).reshape(2, 16) % 9}, "train": False}
    with pytest.raises(VerificationError, match=r"at .*forward_fn.*chunk_size_feed_forward=0"):
        tokenprune.wrap(BertForSequenceClassification(config).eval(), RECIPE, **given)
    config.chunk_size_feed_forward = 0
    host = BertForSequenceClassification(config).eval()
    assert tokenprune.wrap(host, RECIPE, **given)(**given["example_inputs"]).logits.shape == (2, 2)
