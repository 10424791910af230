"""Merging and fusing under `torch.compile`: one graph, in eval and in training."""

import inspect
from inspect import isfunction

import pytest
import torch
from jaxtyping import config

import tokenprune
from tests.reductions.test_merge import images, vit
from tokenprune.ops.matching import Groups, Pairs
from tokenprune.ops.merging import Merged


@pytest.fixture(autouse=True)
def no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of shapes, which are there in the tests alone, are code that Dynamo cannot read."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    for cls in (Groups, Pairs, Merged):
        for name, value in vars(cls).items():
            if isinstance(value, property) and value.fget is not None:
                monkeypatch.setattr(cls, name, property(inspect.unwrap(value.fget)))
            elif isfunction(value) and hasattr(value, "__wrapped__"):
                monkeypatch.setattr(cls, name, inspect.unwrap(value))


MERGED = pytest.param(
    "merge-k0.6",
    marks=pytest.mark.skipif(
        torch.__version__ < "2.11", reason="Dynamo of torch 2.8 reads no property of a named tuple"
    ),
)


@pytest.mark.parametrize("name", [MERGED, "evit-k0.6"])
def test_one_graph(name: str) -> None:
    model = tokenprune.wrap(vit(depth=3), name, verify=False, train=False).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))
    x = images()
    compiled.train()(x).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad)
