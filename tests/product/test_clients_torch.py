"""What torch itself does to a model: traces, casts, the meta device, threads."""

import io
from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import tokenprune
from tests.product.client_hosts import IMAGES, hf_vit, keeping_all, logits, rewrapped, vit, wrapped
from tokenprune.errors import HostError

HOSTS = pytest.mark.parametrize("make", [vit, hf_vit])


OF_JIT = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@OF_JIT
@HOSTS
def test_jit_trace_and_script_are_refused(make: Callable[[], Any]) -> None:
    model = wrapped(make())
    wanted = logits(model)
    with pytest.raises(HostError, match=r"Call tokenprune\.export\(model, \"model\.onnx\"\)"):
        torch.jit.trace(model, IMAGES, strict=False)
    with pytest.raises(HostError, match=r"torch\.jit\.trace \(or the old torch\.onnx exporter\)"):
        torch.onnx.export(model, (IMAGES,), io.BytesIO(), dynamo=False)
    for scripted in (model, torch.nn.Sequential(model)):
        with pytest.raises(HostError, match=r"torch\.jit\.script.*Call tokenprune\.export"):
            torch.jit.script(scripted)
    assert torch.equal(logits(model), wanted)


@OF_JIT
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces_the_dense_path() -> None:
    model = wrapped(vit())
    with model.using("dense"):
        traced = torch.jit.trace(model, IMAGES)
    torch.testing.assert_close(traced(IMAGES), logits(tokenprune.unwrap(model)))


@pytest.mark.parametrize(("make", "dtype"), [(vit, torch.float16), (hf_vit, torch.bfloat16)])
def test_casts(make: Callable[[], Any], dtype: torch.dtype) -> None:
    model = wrapped(make())
    wanted, images = logits(model), IMAGES.to(dtype)
    model.to(dtype)
    found = logits(model, images)
    assert found.dtype is dtype
    assert torch.equal(found, logits(rewrapped(make().to(dtype), model), images))
    traced = tokenprune.cache_info(model).traced
    model.float()
    again = logits(model)
    assert torch.equal(again, logits(rewrapped(tokenprune.unwrap(model), model)))
    torch.testing.assert_close(again, wanted, atol=0.02, rtol=0)
    assert tokenprune.cache_info(model).traced == traced


def test_programs_are_made_where_another_mode_runs() -> None:
    recipe = {"version": 1, "schedule": {"keep_ratio": 0.7}, "unread_rows": True}
    model = tokenprune.wrap(vit().eval(), recipe, train=False, verify=False)
    tokenprune.clear_cache(model)
    with torch.no_grad():
        graph = make_fx(model)(IMAGES)
    torch.testing.assert_close(graph(-IMAGES), logits(model, -IMAGES))


@HOSTS
def test_meta_device_and_back(make: Callable[[], Any]) -> None:
    model = wrapped(make())
    wanted = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")
    assert logits(model, IMAGES.to("meta")).shape == (2, 5)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(keeping_all(model), logits(tokenprune.unwrap(model)))


def test_each_thread_has_its_own_path() -> None:
    like, model = wrapped(vit()), wrapped(vit())
    wanted: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {}
    for path in ("dense", "mask", "gather"):
        with like.using(path):
            wanted[path] = logits(like)
    every = torch.arange(16).expand(2, 16)
    together = Barrier(4)

    def run(name: str, **forced: Any) -> None:
        found[name] = []
        together.wait()
        for _ in range(5):
            with model.using(**forced):
                found[name].append(logits(model))

    threads = [Thread(target=run, args=(path,), kwargs={"path": path}) for path in wanted]
    threads.append(Thread(target=run, args=("all",), kwargs={"keep_indices": [every, every]}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted["all"] = keeping_all(like)
    assert found.keys() == wanted.keys()
    for name, outputs in found.items():
        assert len(outputs) == 5
        assert all(torch.equal(output, wanted[name]) for output in outputs), name
    assert torch.equal(logits(model), wanted["gather"])


def test_threads_trace_at_once() -> None:
    """Each thread's first call is of another kind, so that each traces while the others run."""
    model, like = wrapped(hf_vit()), wrapped(hf_vit())
    calls = [{}, {"output_hidden_states": False}, {"return_dict": True}]
    found: list[Tensor] = []
    together = Barrier(len(calls))

    def run(options: dict[str, Any]) -> None:
        together.wait()
        for _ in range(3):
            found.append(model(IMAGES, **options).logits)

    threads = [Thread(target=run, args=(options,)) for options in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(output, logits(like)) for output in found)
