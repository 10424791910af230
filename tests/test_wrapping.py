"""`wrap` and `unwrap`: what is shared with the host, what is refused, what a wrapped model is."""

import inspect
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import (
    HostError,
    NonFiniteWeightsError,
    NotWrappedError,
    PlanError,
    UnsupportedHostError,
)
from tokenprune.runtime.model import PrunedModel
from tokenprune.scorers.protocol import PREDICTORS

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    build = timm.models.vision_transformer.VisionTransformer
    return build(**{**small, "num_classes": 5, **options}).eval()


def wrapped(host: nn.Module | None = None, **options: Any) -> Any:
    return tokenprune.wrap(vit() if host is None else host, RECIPE, **{"verify": False, **options})


def test_a_wrapped_model_is_of_the_hosts_class_and_called_like_it() -> None:
    host = vit()
    model = wrapped(host)
    assert isinstance(model, type(host))
    assert isinstance(model, PrunedModel)
    assert type(model).__name__ == "VisionTransformer"
    assert type(model).__module__ == type(host).__module__
    assert str(model).startswith("TokenPruned[VisionTransformer](")
    theirs = list(inspect.signature(host.forward).parameters)
    assert list(inspect.signature(model.forward).parameters) == [*theirs, "return_trace"]
    assert model.get_classifier() is host.head
    assert model.no_weight_decay() == host.no_weight_decay()
    assert type(wrapped()) is type(model)  # one class for one class of hosts


def test_the_configuration_of_a_transformers_host_is_its_own() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_labels=5,
        num_hidden_layers=3, num_attention_heads=2,
    )  # fmt: skip
    host = transformers.ViTForImageClassification(config)
    model = wrapped(host)
    assert model.config is host.config
    assert model.dtype == torch.float32
    out, _ = model.eval()(torch.zeros(1, 3, 32, 32), return_trace=True)
    assert type(out) is type(host.eval()(torch.zeros(1, 3, 32, 32)))


def test_everything_is_shared_with_the_host_and_nothing_added_to_it() -> None:
    host = vit()
    keys, attributes = list(host.state_dict()), sorted(vars(host))
    model = wrapped(host)
    for name, parameter in host.named_parameters():
        assert model.get_parameter(name) is parameter
    assert model.blocks is host.blocks
    assert list(host.state_dict()) == keys
    assert sorted(vars(host)) == attributes
    assert PREDICTORS not in dict(host.named_children())
    assert tokenprune.unwrap(model) is host


def test_what_is_set_on_the_wrapped_model_is_set_on_the_host() -> None:
    host = vit()
    model = wrapped(host)
    model.head = nn.Linear(16, 2)
    assert host.head is model.head
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    model.train()
    assert host.training
    assert not hasattr(host, PREDICTORS)


def test_hooks_are_those_of_the_host() -> None:
    host, seen = vit(), []
    host.register_forward_hook(lambda *_: seen.append("before"))
    model = wrapped(host)
    added = model.register_forward_hook(lambda *_: seen.append("after"))
    for either in (model, host):
        seen.clear()
        either(torch.zeros(1, 3, 32, 32))
        assert seen == ["before", "after"]
    added.remove()
    assert len(host._forward_hooks) == 1


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_those_of_the_host(training: bool) -> None:
    host = vit().train(training)
    host.blocks[1].train(not training)
    model = tokenprune.wrap(host, RECIPE)
    assert model.training == training
    assert model.blocks[1].training != training
    assert getattr(model, PREDICTORS).training == training
    assert getattr(model, PREDICTORS)[0].training == training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_predictors_have_the_type_of_the_host(dtype: torch.dtype) -> None:
    model = wrapped(vit().to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.eval()(torch.zeros(1, 3, 32, 32, dtype=dtype)).dtype == dtype


def test_predictors_answer_to_the_recipe_and_the_seed() -> None:
    recipe = {**RECIPE, "predictor": {"activation": "relu"}}
    torch.manual_seed(3)
    models = [tokenprune.wrap(vit(), recipe, verify=False) for _ in range(2)]
    first, second = (getattr(model, PREDICTORS) for model in models)
    assert len(first) == 2
    assert isinstance(first[0].in_proj[2], nn.ReLU)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # `vit` sets the seed
    assert not torch.equal(first[0].in_proj[1].weight, first[1].in_proj[1].weight)


def test_the_generators_state_moves_by_the_predictors_alone() -> None:
    torch.manual_seed(5)
    host = vit()
    state = torch.get_rng_state()
    wrapped(host)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    for _ in range(2):
        tokenprune.scorers.learned.TokenPredictor(16)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 3, 32, 32),
        [torch.zeros(1, 3, 32, 32)],
        {"x": torch.zeros(2, 3, 32, 32)},
        {"x": torch.zeros(2, 3, 32, 32), "attn_mask": None},
    ],
)
def test_example_inputs_in_every_form(example: Any) -> None:
    model = tokenprune.wrap(vit(), RECIPE, example_inputs=example, train=False)
    assert model._pruning.cache.info().programs == 1


class Odd(nn.Module):
    """Blocks over tokens; nothing an adapter knows."""

    def __init__(self, taken: str | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        if taken:
            setattr(self, taken, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=1)


def odd(prefix: int = 0, **options: Any) -> Any:
    spec = tokenprune.ArchSpec(adapter="by hand", blocks=BLOCKS, num_prefix_tokens=prefix)
    return tokenprune.wrap(
        Odd(**options), RECIPE, adapter=spec, example_inputs=torch.zeros(2, 5, 4)
    )


def test_what_a_host_was_wrapped_with_says_how_its_inputs_look() -> None:
    model = odd()
    assert tokenprune.verify(model).num_patches == 5
    drawn = model._pruning.inputs(None).tensors["x"]
    assert drawn.shape == (2, 5, 4)
    assert drawn.unique().numel() == drawn.numel()


def traces_itself() -> Any:
    class Traces(Odd):
        def forward(self, x: Tensor, return_trace: bool = False) -> Tensor:
            return super().forward(x)

    return tokenprune.wrap(Traces(), RECIPE, example_inputs=torch.zeros(2, 5, 4))


def replaced_forward() -> Any:
    host = vit()
    host.forward = lambda x: x
    return wrapped(host)


def nan_buffer(value: float = float("nan")) -> Any:
    host = vit()
    host.register_buffer("mask", torch.tensor([0.0, value]))
    return wrapped(host)


def infinite_weight() -> Any:
    host = vit()
    with torch.no_grad():
        host.norm.weight[:2] = torch.tensor([float("inf"), -float("inf")])
    return wrapped(host)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: wrapped(torch.zeros(1)),
            UnsupportedHostError,
            r"needs an nn\.Module, found Tensor",
        ),
        (replaced_forward, UnsupportedHostError, "forward of this VisionTransformer was replaced"),
        (lambda: odd(taken=PREDICTORS), UnsupportedHostError, f"Odd has an .* '{PREDICTORS}'"),
        (lambda: odd(taken="token_bypasses"), UnsupportedHostError, "attribute 'token_bypasses'"),
        (lambda: odd(taken="_pruning"), UnsupportedHostError, "attribute '_pruning' of its own"),
        (lambda: odd(taken="using"), UnsupportedHostError, "attribute 'using' of its own"),
        (lambda: odd(taken="set_threshold"), UnsupportedHostError, "attribute 'set_threshold'"),
        (traces_itself, UnsupportedHostError, "Traces has an argument 'return_trace'"),
        (nan_buffer, NonFiniteWeightsError, "Buffer 'mask' of VisionTransformer holds NaN"),
        (infinite_weight, NonFiniteWeightsError, "'norm.weight' of .* holds 2 values"),
        (lambda: odd(prefix=4), PlanError, r"1 patch tokens after 4 prefix tokens.*Check num_"),
        (
            lambda: wrapped(example_inputs=[]),
            HostError,
            "example_inputs must hold at least one tensor, found nothing",
        ),
        (
            lambda: wrapped(example_inputs={"x": 3}),
            HostError,
            r"at least one tensor, found \['x'\]",
        ),
        (
            lambda: wrapped(example_inputs=torch.zeros(0, 3, 32, 32)),
            HostError,
            r"hold an empty batch \(x\)\. Give at least one image",
        ),
        (
            lambda: wrapped(example_inputs={"x": torch.zeros(1, 3, 32, 32), "y": 1}),
            HostError,
            r"takes \(x, .*\), but was called with \(x, y\)",
        ),
        (
            lambda: tokenprune.wrap(
                Odd(), RECIPE, adapter=tokenprune.ArchSpec(
                    adapter="by hand", blocks=BLOCKS, num_prefix_tokens=0)),
            UnsupportedHostError,
            r"Adapter 'by hand' knows no input shape of Odd\. Pass example_inputs=",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_minus_infinity_in_a_buffer_is_a_mask() -> None:
    assert isinstance(nan_buffer(-float("inf")), PrunedModel)
    assert isinstance(odd(), PrunedModel)


@pytest.mark.parametrize("thing", [vit(), nn.Identity()], ids=["a host", "any module"])
def test_only_wrapped_models_are_unwrapped(thing: nn.Module) -> None:
    with pytest.raises(NotWrappedError, match=f"found {type(thing).__name__}"):
        tokenprune.unwrap(thing)


def test_names_at_the_top() -> None:
    for name in tokenprune.__all__:
        assert getattr(tokenprune, name) is not None
    assert tokenprune.convert_dynamicvit is tokenprune.checkpoints.dynamicvit.convert_dynamicvit
    assert tokenprune.load_dynamicvit is tokenprune.checkpoints.dynamicvit.load_dynamicvit


@pytest.mark.slow
def test_a_host_that_was_compiled_in_place_is_pruned() -> None:
    host = vit()
    host.compile(backend="eager")
    model = tokenprune.wrap(host, RECIPE).eval()
    _, trace = model(torch.randn(2, 3, 32, 32), return_trace=True)
    assert trace.stages[0].num_tokens < 16


def test_a_default_device_does_not_matter() -> None:
    host = vit()
    with torch.device("meta"):
        model = tokenprune.wrap(host, RECIPE)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
