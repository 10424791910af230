"""What people use hooks for, with the libraries that do it: capturing, offloading, sharding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from jaxtyping import config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import ViTConfig, ViTForImageClassification

import tokenprune
from tests.toys.table import TOYS
from tokenprune.errors import TokenPruneError
from tokenprune.hosts.spec import ArchSpec

timm = pytest.importorskip("timm")
RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
NAME = "vit_small_patch16_224"


@pytest.fixture
def host() -> nn.Module:
    """With parameters that blocks read themselves."""
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5, init_values=0.5, **SMALL).eval()


@pytest.fixture
def model(host: nn.Module) -> Any:
    return tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_accelerate_offloads_weights(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        wanted = model(images)
        cpu_offload(model, execution_device="cpu")
        assert model.blocks[1].ls1.gamma.is_meta
        assert torch.equal(model(images), wanted)
        model(torch.cat([images, images])[:3])
        assert model.blocks[1].ls1.gamma.is_meta


def test_hooks_of_accelerate_come_and_go(model: Any, images: Tensor) -> None:
    seen: list[str] = []

    class Note(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2 if isinstance(module, nn.Linear) else output

    wanted = model(images)
    for path in ("blocks.1", "blocks.1.mlp"):
        add_hook_to_module(model.get_submodule(path), Note())
    assert torch.equal(model(images), wanted)
    assert seen == ["Block", "Mlp"]
    add_hook_to_module(model.blocks[1].mlp.fc1, Note())
    assert not torch.equal(model(images), wanted)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(images), wanted)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_blocks_that_fsdp_shards(model: Any, images: Tensor, dtype: torch.dtype | None) -> None:
    wanted = model(images)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for part in (*model.blocks, *([] if dtype is None else [model])):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    found = model(images)
    assert found.dtype == (dtype or torch.float32)
    torch.testing.assert_close(found.float(), wanted, atol=0.05 if dtype else 1e-5, rtol=0)
    found.sum().backward()
    assert model.blocks[1].ls1.gamma.grad is not None


@pytest.mark.parametrize("hooked_before", [True, False])
def test_outputs_that_transformers_collects_by_hooks(hooked_before: bool) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        attn_implementation="eager",
    )
    host = ViTForImageClassification(config).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        if hooked_before:
            host(images, output_hidden_states=True)
        model = tokenprune.wrap(host, RECIPE, restore=True, verify=False, train=False).eval()
        plain = model(images, output_hidden_states=True)
        assert [state.shape for state in plain.hidden_states] == [(2, 17, 32)] * 5
        seen: list[Tensor] = []
        with host.vit.layers[2].register_forward_hook(lambda m, a, out: seen.append(out)):
            hooked = model(images, output_hidden_states=True)
        assert [tokens.shape for tokens in seen] == [(2, 5, 32)]
        for ours, theirs in zip(hooked.hidden_states, plain.hidden_states, strict=True):
            assert torch.equal(ours, theirs)


def test_features_that_timm_collects_by_hooks(images: Tensor) -> None:
    hooks = {"features_only": True, "out_indices": (1, 3), "feature_cls": "hook"}
    host = timm.create_model(NAME, **SMALL, **hooks).eval()
    blocks = tuple(f"body.blocks.{i}" for i in range(4))
    spec = ArchSpec(adapter="by hand", blocks=blocks, num_prefix_tokens=1, norm=None)
    given = {"restore": True, "adapter": spec, "example_inputs": images}
    features = tokenprune.wrap(host, RECIPE, **given).eval()(images)
    assert [feature.shape for feature in features] == [(2, 17, 32)] * 2


def test_a_hook_on_the_final_norm_runs_once_where_tokens_come_back(images: Tensor) -> None:
    host = timm.create_model(NAME, num_classes=0, global_pool="", **SMALL).eval()
    model = tokenprune.wrap(host, RECIPE, restore=True).eval()
    seen: list[Tensor] = []
    for kept in ("mask", "gather"):
        seen.clear()
        with host.norm.register_forward_hook(lambda m, args, out: seen.append(out)):  # noqa: SIM117
            with model.using(kept):
                found = model(images)
        assert len(seen) == 1
        assert torch.equal(seen[0], found)


@pytest.mark.parametrize("tracer", [torch.fx.symbolic_trace, create_feature_extractor])
def test_torch_fx_is_refused(model: Any, tracer: Any) -> None:
    rest = (["norm"],) if tracer is create_feature_extractor else ()
    with pytest.raises(TokenPruneError, match=r"torch\.fx.*tokenprune\.export"):
        tracer(model, *rest)


# torch says so of every tensor that goes over a break of a compiled graph
@pytest.mark.filterwarnings("ignore:hook ")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_runs_hooks_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # the shape checks break the graphs
    toy = TOYS["prefix_2"]
    model = toy.wrap(verify=False, train=False)
    images, block, seen = toy.inputs()["x"], model.blocks[1], list[str]()

    def forward(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.append("forward")
        return 2 * output

    def before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append("before")
        return tuple(3 * given for given in args)

    def backward(module: Any, grad_input: Any, grad_output: Any) -> tuple[Tensor, ...]:
        seen.append("backward")
        return (5 * grad_input[0],)

    def run(called: Any) -> tuple[Tensor, Tensor]:
        out = called(images)
        (gradient,) = torch.autograd.grad(out.sum(), model.blocks[0].attn.qkv.weight)
        return out, gradient

    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    plain = run(model)
    torch.testing.assert_close(run(compiled), plain)
    handles = [
        block.register_forward_hook(forward),
        block.register_forward_pre_hook(before),
        block.register_full_backward_hook(backward),
    ]
    hooked = run(model)
    seen.clear()
    torch.testing.assert_close(run(compiled), hooked)
    assert seen == ["before", "forward", "backward"]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(run(compiled), plain)
    assert not torch.equal(hooked[1], plain[1])
