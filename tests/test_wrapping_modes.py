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
from tokenprune.errors import TokenPruneWarning, TraceError, UnsupportedHostError
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


@pytest.mark.parametrize("size", [4, 16])
def test_tokens_leave_a_chunked_feed_forward(size: int) -> None:
    """Python goes through the chunks: a program has as many, of fewer tokens each."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
    config = BertConfig(**sizes, num_hidden_layers=3, chunk_size_feed_forward=size)
    words = {"input_ids": torch.arange(32).reshape(2, 16) % 9}
    host = BertForSequenceClassification(config).eval()
    model = tokenprune.wrap(host, RECIPE, example_inputs=words, train=False)
    assert model(**words).logits.shape == (2, 2)


@pytest.mark.parametrize("cut", [lambda x: x.split(5, dim=1), lambda x: x.unbind(1)])
def test_parts_of_other_sizes_are_refused_by_name(cut: Any) -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([part.reshape(len(x), -1, x.shape[2]) for part in cut(x)], dim=1)

    host = Vit().eval()
    host.blocks[2].mlp = Parts()
    with pytest.raises(UnsupportedHostError, match=r"cannot run with fewer tokens.*blocks.2"):
        wrapped(host)
