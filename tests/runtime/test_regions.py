"""Wrapped hosts that change modes in their forward, or checkpoint parts of it."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tokenprune
from tests.toys.vit import Vit, pixels, randomize_weights
from tokenprune.ops.attention import masked_attention
from tokenprune.runtime import regions
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.modes import MODES, Mode

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}
MIDDLE = RECIPE | {"place": "middle"}
IMAGES = pixels(2, 16)
EVERY = [torch.arange(16).expand(2, -1)] * 2


class Toy(Vit):
    """Its `way` runs the blocks; `bias` is a table that they may share."""

    way: ClassVar[Callable[[Any, Tensor], Tensor]]

    def __init__(self) -> None:
        super().__init__(prefix=0)
        self.bias = nn.Parameter(torch.zeros(16, 16))

    def run(self, x: Tensor) -> Tensor:
        return type(self).way(self, x)


def wrapped(
    way: Callable[[Any, Tensor], Tensor], verify: bool = False, recipe: Any = RECIPE
) -> tuple[Toy, Any]:
    torch.manual_seed(0)
    host = type("Toy", (Toy,), {"way": way})()
    randomize_weights(host, 3)
    options = {"example_inputs": IMAGES, "verify": verify, "train": verify}
    return host, tokenprune.wrap(host, recipe, **options)


def trained(host: nn.Module) -> set[str]:
    """The parts that got a gradient."""
    given = [(n, p) for n, p in host.named_parameters() if p.grad is not None and p.grad.any()]
    paths = [name.split(".") for name, _ in given]
    return {".".join(path[:2]) if path[0] == "blocks" else path[0] for path in paths}


def frozen_start(host: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = host.blocks[1](host.blocks[0](x))
    return host.blocks[2](x)


@pytest.mark.parametrize("verify", [True, False])
def test_what_runs_without_gradients_gets_none(verify: bool) -> None:
    host, model = wrapped(frozen_start, verify)
    model.train()(IMAGES).square().sum().backward()
    assert trained(host) == {"blocks.2", "norm", "head"}


def test_a_predictor_in_a_frozen_part_learns() -> None:
    _, model = wrapped(frozen_start)
    model.train()(IMAGES).square().sum().backward()
    assert all(p.grad is not None for p in model.token_predictors.parameters())
    tokenprune.verify(model, IMAGES)


def test_what_hides_tokens_runs_in_the_modes_of_what_it_replaces() -> None:
    host, model = wrapped(frozen_start)
    graph = next(iter(pruning_of(model).cache)).get(host, "mask").rewrite.graph
    masked = [node for node in graph.nodes if node.target is masked_attention]
    no_grad = (Mode("grad", False),)
    assert [node.meta.get(MODES, ()) for node in masked] == [no_grad, ()]


def test_a_table_that_is_shared_learns_where_it_may() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        x = host.blocks[0](x)
        with torch.no_grad():
            x = host.blocks[1](x, host.bias)
        return host.blocks[2](x, host.bias)

    one_stage = {"version": 1, "schedule": {"blocks": [1], "keep_ratio": 0.5}}
    host, model = wrapped(way, recipe=one_stage)
    with model.train().using("gather"):
        model(IMAGES).square().sum().backward()
    assert {"bias", "blocks.2"} <= trained(host)


def test_gradients_inside_a_part_that_has_none() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = host.blocks[0](x)
            with torch.enable_grad():
                x = host.blocks[1](x)
        return host.blocks[2](x)

    host, model = wrapped(way)
    model.train()(IMAGES).square().sum().backward()
    assert trained(host) == {"blocks.1", "blocks.2", "norm", "head"}


def test_gradients_of_the_hosts_own_inside_a_callers_no_grad() -> None:
    @torch.enable_grad()
    def way(host: Any, x: Tensor) -> Tensor:
        return host.blocks[2](host.blocks[1](host.blocks[0](x)))

    host, model = wrapped(way)
    model.eval()
    with torch.no_grad(), model.using("gather"):
        _, trace = model(IMAGES, return_trace=True)
        assert not model(IMAGES).requires_grad
    trace.stages[0].keep_logits.square().sum().backward()
    assert "blocks.0" in trained(host)
    assert "patch" not in trained(host)


def test_inference_mode() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return host.blocks[2](host.blocks[1](host.blocks[0](x)))

    _, model = wrapped(way)
    with torch.no_grad(), model.eval().using("gather", keep_indices=EVERY):
        _, trace = model(IMAGES, return_trace=True)
        assert torch.equal(model(IMAGES), model._pruning.host(IMAGES))
    assert trace.stages[0].keep_logits.is_inference()


def test_autocast_off_inside_autocast_keeps_float32() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        x = host.blocks[0](x)
        with torch.autocast("cpu", enabled=False):
            x = host.blocks[1](x.float())
        return host.blocks[2](x)

    host, model = wrapped(way)
    types: list[torch.dtype] = []
    host.blocks[1].mlp[2].register_forward_hook(lambda *given: types.append(given[-1].dtype))
    host.blocks[2].mlp[2].register_forward_hook(lambda *given: types.append(given[-1].dtype))
    model.eval()
    low = torch.autocast("cpu", dtype=torch.bfloat16)
    with low, torch.no_grad(), model.using("gather", keep_indices=EVERY):
        model(IMAGES)
        types.clear()  # of the trace
        assert torch.equal(model(IMAGES), host(IMAGES))
    assert types == [torch.float32, torch.bfloat16] * 2
    with torch.no_grad(), model.using("gather", keep_indices=EVERY):
        assert torch.equal(model(IMAGES), host(IMAGES))


def test_a_host_that_casts_by_itself_is_certified() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return host.blocks[2](host.blocks[1](host.blocks[0](x)))

    wrapped(way, verify=True)


def math_is_alone() -> bool:
    cuda = torch.backends.cuda
    return cuda.math_sdp_enabled() and not cuda.flash_sdp_enabled()


def test_the_choice_of_attentions_is_made_when_the_program_runs() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            x = host.blocks[1](host.blocks[0](x))
        return host.blocks[2](x)

    host, model = wrapped(way)
    found = []
    model.train()(IMAGES)
    for block in host.blocks:
        block.attn.proj.register_forward_hook(lambda *_: found.append(math_is_alone()))
    model(IMAGES)
    assert found == [True, True, False]
    assert not math_is_alone()


def test_python_that_reads_the_mode_is_traced_in_each() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        for block in host.blocks:
            x = block(x)
        return x * 2 if torch.is_grad_enabled() else x

    host, model = wrapped(way, verify=True)
    model.eval()
    for mode in (torch.enable_grad, torch.no_grad, torch.enable_grad, torch.no_grad):
        with mode(), model.using("gather", keep_indices=EVERY):
            assert torch.equal(model(IMAGES), host(IMAGES))
    assert tokenprune.cache_info(model).programs == 3  # one for training


def test_python_that_reads_a_flag_is_traced_for_each() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        for block in host.blocks:
            x = block(x)
        return x * 2 if x.requires_grad else x

    host, model = wrapped(way)
    model.eval()
    for flag in (True, False, True, False):
        host.requires_grad_(flag)
        with model.using("gather", keep_indices=EVERY):
            assert torch.equal(model(IMAGES), host(IMAGES))
    assert tokenprune.cache_info(model).programs == 2


def test_an_error_inside_leaves_the_mode_as_it_was() -> None:
    host, model = wrapped(frozen_start)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    model.train()(IMAGES)
    handle = host.blocks[1].attn.proj.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(IMAGES)
    assert torch.is_grad_enabled()
    handle.remove()
    model(IMAGES).sum().backward()


def checkpointed_blocks(host: Any, x: Tensor) -> Tensor:
    for block in host.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def test_no_recomputation_is_prepared_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    host, model = wrapped(checkpointed_blocks)
    calls: list[Any] = []
    monkeypatch.setattr(regions, "checkpoint", lambda *given, **_: calls.append(given) or given[1])
    with torch.no_grad(), model.eval().using("gather", keep_indices=EVERY):
        assert torch.equal(model(IMAGES), host(IMAGES))
    assert not calls
    model.train()(IMAGES)
    assert len(calls) == 3


def test_a_region_inside_a_mode_and_modes_inside_a_region() -> None:
    def way(host: Any, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            with torch.no_grad():
                x = host.blocks[1](x)
            return host.blocks[2](x)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpoint(part, host.blocks[0](x), use_reentrant=False)

    host, model = wrapped(way)
    model.train()
    with model.using(keep_indices=EVERY):
        found = model(IMAGES)
    assert torch.equal(found, host(IMAGES))
    found.square().sum().backward()
    assert trained(host) == {"blocks.2", "norm", "head"}


def small_timm() -> nn.Module:
    rates = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2}
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.VisionTransformer(**size, **rates, num_classes=3)


def small_transformers() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = transformers.ViTConfig(**size, **rates, intermediate_size=64, patch_size=8)
    return transformers.ViTForImageClassification(config)


def small_swin() -> nn.Module:
    size = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.models.SwinTransformer(**size, window_size=4, num_classes=3)


def switch_timm(model: Any) -> None:
    model.set_grad_checkpointing(True)


def switch_transformers(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def switch_transformers_reentrant(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})


def step(model: Any, images: Tensor) -> tuple[int, dict[str, Tensor]]:
    """Elements that one training step keeps for its backward pass, and its gradients."""
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    counted = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with counted, model.using(generator=generator):
        output = model(images)
    getattr(output, "logits", output).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sum(kept), found


def assert_saves_and_changes_no_gradient(make: Any, switch: Any, recipe: Any) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = tokenprune.wrap(make(), recipe, example_inputs=images, verify=False, train=False)
    model.train()
    other = copy.deepcopy(model)
    switch(other)
    kept, wanted = step(model, images)
    kept_less, found = step(other, images)
    again, found_again = step(copy.deepcopy(other), images)
    assert kept_less < 0.5 * kept
    assert again == kept_less
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
        assert torch.equal(found[name], found_again[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "switch"), [(small_timm, switch_timm), (small_transformers, switch_transformers)]
)
def test_checkpointing_saves_memory_and_changes_no_gradient(make: Any, switch: Any) -> None:
    assert_saves_and_changes_no_gradient(make, switch, RECIPE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "switch", "recipe"),
    [
        (small_timm, switch_timm, MIDDLE),
        (small_transformers, switch_transformers_reentrant, RECIPE),
        (small_swin, switch_timm, RECIPE | {"mode": "bypass"}),
    ],
    ids=["middle", "reentrant", "bypass"],
)
def test_checkpointing_of_other_kinds(make: Any, switch: Any, recipe: Any) -> None:
    assert_saves_and_changes_no_gradient(make, switch, recipe)
