"""A wrapped model inside torch.compile: one graph, for every batch size and every image size."""

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
from jaxtyping import config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tokenprune
from tests.product.export_hosts import HOSTS, images, tensors_of, wrapped
from tests.theorems import test_9_places as places
from tests.theorems.changes import CHANGES, LowRank
from tests.theorems.test_9_holders import HOLDERS
from tests.theorems.test_9_live import HOSTS as LIVE_HOSTS
from tests.theorems.test_9_live import IMAGES
from tests.theorems.test_9_live import wrapped as live_model
from tests.toys.vit import Vit, pixels
from tokenprune.errors import TokenPruneWarning, UnsupportedHostError
from tokenprune.ops.bypass import Layout


@pytest.fixture(autouse=True)
def _no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the annotations, which only tests put there, break the graph."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    monkeypatch.setattr(Layout, "gathered", inspect.unwrap(Layout.gathered))


def compiled(model: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    for one, other in zip(tensors_of(found), tensors_of(wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", HOSTS)
def test_one_graph_for_all_batch_sizes(name: str) -> None:
    model = wrapped(name)
    run = compiled(model)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            given = images(name, batch)
            for value in given.values():
                torch._dynamo.mark_dynamic(value, 0)
            assert_same(run(**given), model(**given))


def test_without_a_word_torch_compiles_once_more_and_then_never() -> None:
    model = wrapped("deit")
    run = compiled(model)
    with torch.no_grad():
        for batch in (2, 3):
            run(**images("deit", batch))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (5, 2, 7):
                given = images("deit", batch)
                assert_same(run(**given), model(**given))


def test_a_signature_never_seen_is_traced_when_it_is_compiled() -> None:
    """Nothing has run before: no program is there, and another image size comes later."""
    host = HOSTS["deit"].make(dynamic_img_size=True)
    model = tokenprune.wrap(host, HOSTS["deit"].recipe, verify=False, train=False).eval()
    fresh = copy.deepcopy(model)
    run = compiled(model)
    for side in (16, 24):
        given = torch.randn(2, 3, side, side)
        with torch.no_grad():
            assert_same(run(given), fresh(given))
    assert model._pruning.cache.info().programs == 2


class Regions(Vit):
    """Sets modes around its first blocks, and checkpoints the last."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.blocks[0](x)
        with torch.autocast("cpu", enabled=False), sdpa_kernel(SDPBackend.MATH):
            x = self.blocks[1](x)
        return checkpoint(self.blocks[2], x, use_reentrant=False)


def test_modes_and_checkpointing_inside_the_host() -> None:
    host, given = Regions(prefix=0), pixels(2, 16)
    recipe = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}
    model = tokenprune.wrap(host, recipe, example_inputs=given, verify=False)
    for training in (True, False):
        model.train(training)
        run, found = compiled(model), []
        for each in (model, run):
            torch.manual_seed(0)
            found.append(each(given))
        assert_same(*found)
        found[1].square().sum().backward()
        assert host.patch.weight.grad is None
        assert host.blocks[2].attn.qkv.weight.grad is not None
    strict = torch.export.export(model, (given,), strict=True).module()
    assert_same(strict(given), model(given))


def test_what_changes_after_compiling_is_seen() -> None:
    make, path = LIVE_HOSTS["timm_vit"]
    model = live_model(partial(make, depth=2))
    CHANGES["a_lora_layer"](model, path)
    layer = next(m for m in model.modules() if isinstance(m, LowRank))
    run = compiled(model)
    with torch.no_grad():
        before = run(IMAGES)
        layer.scaling["default"] = 0.1  # nothing runs eagerly before the compiled call
        found = run(IMAGES)
        assert not torch.allclose(found, before)
        assert_same(found, model(IMAGES))
        layer.active = False
        found = run(IMAGES)
        assert_same(found, model(IMAGES))
        CHANGES["an_own_forward_of_a_block"](model, path)
        before, found = found, run(IMAGES)
        assert not torch.allclose(found, before)
        assert_same(found, model(IMAGES))
        handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _a, given: given * 2)
        hooked = run(IMAGES)  # torch's own compiled modules would not see it
        assert not torch.allclose(hooked, found)
        with pytest.warns(TokenPruneWarning, match="^hook .*blocks.0.mlp.fc1"):
            assert_same(hooked, model(IMAGES))
        handle.remove()
        assert_same(run(IMAGES), found)


@torch.no_grad()
def test_9_a_compiled_model_sees_it_too() -> None:
    held = {name: HOLDERS[name] for name in ("default", "array", "class", "weak_values")}
    model = places.reads_all(held)
    run = compiled(model)
    before = run(IMAGES)
    for name, (_, _, change) in held.items():
        reader = tokenprune.unwrap(model).get_submodule(f"blocks.2.readers.{name}")
        try:
            change(reader, 3.0)
            wanted = places.wrapped_again(model)
            torch.testing.assert_close(run(IMAGES), wanted, rtol=1e-4, atol=1e-4)
            assert not torch.equal(run(IMAGES), before)
        finally:
            change(reader, 1.0)
        assert torch.equal(run(IMAGES), before)
    tokenprune.freeze_guards(model)
    change(reader, 3.0)
    try:
        torch.testing.assert_close(run(IMAGES), before, rtol=1e-4, atol=1e-4)
    finally:
        change(reader, 1.0)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_9_a_refusal_is_seen_through_torch_compile(whole: bool) -> None:
    make, _ = LIVE_HOSTS["timm_vit"]
    model = live_model(partial(make, depth=2))
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=whole, backend="eager")
    before, head = run(IMAGES), model.head
    model.head = torch.jit.trace(head, torch.ones(2, 16))
    said = r"Module 'head' of VisionTransformer was made by torch\.jit"
    with pytest.raises(RuntimeError if whole else UnsupportedHostError, match=said):
        run(IMAGES)
    model.head = head
    assert torch.equal(run(IMAGES), before)


@torch.no_grad()
def test_a_forward_with_other_arguments_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Vit):
        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
            return super().forward(x)

    model = places.wrapped(Own().eval())
    run, before = compiled(model), model(IMAGES)
    assert_same(run(IMAGES), before)
    monkeypatch.setattr(Own, "forward", lambda self, scale, x: Vit.forward(self, x) * scale)
    given = torch.full((2, 1), 2.0), IMAGES
    with pytest.raises(Exception, match=r"takes \(scale, x\), was put in the place of one with"):
        run(*given)
    assert_same(run(*given), before * 2)
