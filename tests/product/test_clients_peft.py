"""PEFT: LoRA before and after `wrap`, off and on, merged, two at once, with trained predictors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import tokenprune
from tests.product.client_hosts import hf_vit, logits, rewrapped, vit, wrapped

TARGETS = ["qkv", "q_proj", "v_proj", "query", "value"]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")
HOSTS = pytest.mark.parametrize("make", [vit, hf_vit])


def lora(**options: Any) -> LoraConfig:
    """A random update: it changes the outputs at once."""
    return LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **options)


def adapted(model: nn.Module, *names: str, **options: Any) -> Any:
    """The same updates each time."""
    torch.manual_seed(3)
    tuned = get_peft_model(model, lora(**options))
    for name in names:
        tuned.add_adapter(name, lora(**options))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return tuned.eval()


@pytest.mark.parametrize(("make", "inner"), [(vit, True), (vit, False), (hf_vit, False)])
def test_lora_after_and_before(make: Callable[[], Any], inner: bool) -> None:
    model = wrapped(make())
    plain = logits(model)
    tuned = adapted(model)
    found = logits(tuned)
    assert not torch.allclose(found, plain)
    before = adapted(make())
    anew = rewrapped(before.base_model.model if inner else before, model)
    assert torch.equal(logits(anew), found)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)
    with (before if inner else anew).disable_adapter():
        assert torch.equal(logits(anew), plain)


@HOSTS
def test_adapter_toggled_ten_times(make: Callable[[], Any]) -> None:
    model = wrapped(make())
    plain, tuned = logits(model), adapted(model)
    before = tokenprune.cache_info(model).traced
    for _ in range(10):
        found = logits(tuned)
        with tuned.disable_adapter():
            assert torch.equal(logits(tuned), plain)
    assert not torch.allclose(found, plain)
    assert tokenprune.cache_info(model).traced - before == 2


def test_two_adapters_switched() -> None:
    model = wrapped(vit())
    tuned = adapted(model, "other")
    wanted = {}
    for name in ("default", "other"):
        tuned.set_adapter(name)
        wanted[name] = logits(tuned)
        host = adapted(vit(), "other")
        host.set_adapter(name)
        assert torch.equal(logits(rewrapped(host.base_model.model, model)), wanted[name])
    before = tokenprune.cache_info(model).traced
    for _ in range(10):
        for name, value in wanted.items():
            tuned.set_adapter(name)
            assert torch.equal(logits(tuned), value)
    assert tokenprune.cache_info(model).traced == before
    assert not torch.allclose(*wanted.values())


@HOSTS
def test_merged(make: Callable[[], Any]) -> None:
    model = wrapped(make())
    tuned = adapted(model)
    found = logits(tuned)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned), found)
    tuned.unmerge_adapter()
    torch.testing.assert_close(logits(tuned), found)
    merged = tuned.merge_and_unload()
    assert merged is model
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), found)
    host = adapted(make()).merge_and_unload()
    assert torch.equal(logits(rewrapped(host, model)), logits(merged))


@HOSTS
def test_predictors_among_modules_to_save(make: Callable[[], Any], tmp_path: Path) -> None:
    model = wrapped(make())
    before = logits(model)
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["token_predictors"])
    )
    assert torch.equal(logits(tuned.eval()), before)
    tuned.train()
    generator = torch.Generator().manual_seed(0)
    with model.using(generator=generator):
        logits(tuned).square().sum().backward()
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert {"lora" if "lora" in name else name.split(".")[2] for name in trained} == {
        "lora",
        "token_predictors",
    }
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(parameter.grad.any() for n, parameter in trained.items() if "lora" not in n)
    torch.optim.SGD(trained.values(), lr=1.0).step()
    found = logits(tuned.eval())
    assert not torch.allclose(found, before)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(wrapped(make()), str(tmp_path)).eval()
    assert torch.equal(logits(again), found)


def test_predictors_stay_a_list() -> None:
    predictors = wrapped(vit()).token_predictors
    assert len(predictors) == 2
    assert [type(one) for one in predictors] == [type(predictors[-1])] * 2
