"""What has to hold on a card: `pytest -m gpu`, on a machine that has one.

`TOKENPRUNE_GPU_TESTS_ON=cpu pytest -m gpu` tries the tests themselves where there is none.
"""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from jaxtyping import config
from torch import Tensor, nn

import tokenprune
from tests.zoo.rows import randomize_weights
from tokenprune.errors import TokenPruneError

OF_TORCH = (  # inductor is imported late; the thread of backward has no context of its own yet
    "ignore:`torch._prims_common.check` is deprecated:FutureWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning",
)
pytestmark = [pytest.mark.gpu, pytest.mark.slow, *map(pytest.mark.filterwarnings, OF_TORCH)]
BOUND = 1e-3  # of the output's scale: a card adds in another order
RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 3], "keep_ratio": 0.6}}
MERGE: dict[str, Any] = {**RECIPE, "mode": "merge"}
SIZE, PATCHES = 72, 81  # with a class token no multiple of any tile


@pytest.fixture(scope="module")
def device() -> torch.device:
    asked = os.environ.get("TOKENPRUNE_GPU_TESTS_ON")
    if asked is None and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: run `pytest -m gpu` where there is one")
    return torch.device(asked or "cuda")


def timm_vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=64, depth=5, num_heads=4, num_classes=10
    )


def timm_eva() -> nn.Module:
    return timm.models.Eva(
        img_size=SIZE, patch_size=8, embed_dim=64, depth=5, num_heads=4, num_classes=10,
        use_rot_pos_emb=True,
    )  # fmt: skip


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=64, intermediate_size=128, num_labels=10,
        num_hidden_layers=5, num_attention_heads=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


METHODS = pytest.mark.parametrize("recipe", [RECIPE, MERGE], ids=["remove", "merge"])
HOSTS = pytest.mark.parametrize("make", [timm_vit, timm_eva, hf_vit])


def wrapped(
    make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, recipe: Any = RECIPE
) -> Any:
    torch.manual_seed(0)
    host = make().eval()
    randomize_weights(host, 2.0)
    host.to(device, dtype)
    return tokenprune.wrap(
        host, recipe, example_inputs=images(2, device, dtype), verify=False
    ).eval()


def images(batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
    return drawn.to(device, dtype)


def kept_sets(batch: int, device: torch.device) -> list[Tensor]:
    order = torch.rand(batch, PATCHES, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return [order[:, :count].to(device) for count in (50, 23)]


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output).float().cpu()  # type: ignore[no-any-return]


def assert_close(found: Any, expected: Any, bound: float = BOUND) -> None:
    found, expected = logits(found), logits(expected)
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.fixture(autouse=True)
def as_without_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What checks types of arguments in tests cannot be compiled."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    yield
    torch.compiler.reset()


@HOSTS
@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certificate(make: Any, device: torch.device, dtype: torch.dtype, recipe: Any) -> None:
    model = wrapped(make, device, dtype, recipe)
    certificate = tokenprune.verify(model, images(2, device, dtype))
    assert all(check.passed for check in certificate.checks), str(certificate)


@HOSTS
@torch.no_grad()
def test_mask_is_gather(make: Any, device: torch.device) -> None:
    model = wrapped(make, device, torch.float32)
    found = {}
    for path in ("mask", "gather"):
        with model.using(path, keep_indices=kept_sets(3, device)):
            found[path] = model(images(3, device))
    assert_close(found["mask"], found["gather"])


@HOSTS
@torch.no_grad()
def test_counts_of_each_image_are_those_of_one_image_at_a_time(
    make: Any, device: torch.device
) -> None:
    model = wrapped(make, device, torch.float32)
    model.set_threshold(0.5)
    given = images(5, device)
    together, trace = model(given, return_trace=True)
    alone = torch.cat([logits(model(given[at : at + 1])) for at in range(5)])
    assert_close(together, alone)
    assert len(trace.stages) == 2


@HOSTS
def test_a_training_step_is_that_of_the_cpu(make: Any, device: torch.device) -> None:
    gradients = []
    for place in (torch.device("cpu"), device):
        model = wrapped(make, place, torch.float32).train()
        with model.using("mask", keep_indices=kept_sets(3, place)):
            output = model(images(3, place))
        getattr(output, "logits", output).square().mean().backward()
        named = model.named_parameters()
        gradients.append({n: p.grad.cpu() for n, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max()
        assert error <= 1e-2 * expected.abs().max() + 1e-6, name


@HOSTS
def test_a_sampled_step_under_autocast_is_finite(make: Any, device: torch.device) -> None:
    model = wrapped(make, device, torch.float32).train()
    with torch.autocast(device.type, torch.bfloat16):
        output, trace = model(images(4, device), return_trace=True)
    total = getattr(output, "logits", output).float().square().mean()
    (total + sum(stage.decision.float().mean() for stage in trace.stages)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor.*")  # hints on how to be faster
@HOSTS
def test_one_graph_when_compiled(make: Any, device: torch.device) -> None:
    model, given = wrapped(make, device, torch.float32), images(4, device)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(given), model(given))
    output = compiled.train()(given)
    getattr(output, "logits", output).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.token_predictors[0].in_proj[1].weight.grad is not None


@HOSTS
@METHODS
@torch.no_grad()
def test_a_cuda_graph_captures_eval(make: Any, device: torch.device, recipe: Any) -> None:
    if device.type != "cuda":
        pytest.skip(f"CUDA graphs are of CUDA devices, this is {device.type}")
    dtype = torch.bfloat16
    model, given = wrapped(make, device, dtype, recipe), images(4, device, dtype)
    tokenprune.freeze_guards(model)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a synchronisation inside raises
        output = model(given)
    given.copy_(images(4, device, torch.bfloat16).flip(0))
    graph.replay()
    assert_close(output, model(given), 3e-2)


@HOSTS
@torch.no_grad()
def test_what_is_saved_on_a_card_is_loaded_on_the_cpu(
    make: Any, device: torch.device, tmp_path: Path
) -> None:
    model = wrapped(make, device, torch.float32)
    tokenprune.save(model, tmp_path / "saved")
    loaded = tokenprune.load(tmp_path / "saved", make().eval(), verify=False).eval()
    assert next(loaded.parameters()).device.type == "cpu"
    with loaded.using("gather", keep_indices=kept_sets(2, torch.device("cpu"))):
        found = loaded(images(2, torch.device("cpu")))
    with model.using("gather", keep_indices=kept_sets(2, device)):
        assert_close(found, model(images(2, device)))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@torch.no_grad()
def test_blocks_on_two_devices_are_right_or_refused(device: torch.device) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = wrapped(timm_vit, device, torch.float32)
    expected = logits(model(images(2, device)))
    names = [name for name, _ in model.named_children() if name != "blocks"]
    # accelerate wants places for parameters of the root as well, and warns of them
    places = dict.fromkeys([*names, "cls_token", "pos_embed"], device) | {
        f"blocks.{n}": device for n in range(3)
    }
    places |= {"blocks.3": "cpu", "blocks.4": "cpu"}
    try:
        found = accelerate.dispatch_model(model, places, main_device=device)(images(2, device))
    except TokenPruneError:
        return
    assert_close(found, expected)


@HOSTS
@torch.no_grad()
def test_a_tensor_of_another_device_is_refused(make: Any, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("there is one device alone")
    model = wrapped(make, device, torch.float32)
    expected = model(images(2, device))
    with pytest.raises((TokenPruneError, RuntimeError), match=r"device|cuda|cpu"):
        model(images(2, torch.device("cpu")))
    assert_close(model(images(2, device)), expected)
    moved = copy.deepcopy(model).cpu()
    assert_close(moved(images(2, torch.device("cpu"))), expected)


@torch.no_grad()
def test_no_image_gives_no_output(device: torch.device) -> None:
    model = wrapped(timm_vit, device, torch.float32)
    assert logits(model(images(0, device))).shape == (0, 10)
