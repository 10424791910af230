"""What a user may get wrong: a clear error each, and the host is as it was, to the last bit.

Checkpoints of another host and damaged ones are in `test_checkpoint.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune import errors

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    torch.manual_seed(0)
    build = timm.models.vision_transformer.VisionTransformer
    return build(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=4)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet50", num_classes=4)


class AddsUp(nn.Module):
    """A mixer without a rule: a running sum over tokens, the last one first."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.proj(x).flip(1).cumsum(dim=1).flip(1)


def adding_up() -> nn.Module:
    host = vit()
    host.blocks[2].attn = AddsUp()
    return host


def with_nan() -> nn.Module:
    host = vit()
    with torch.no_grad():
        host.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    return host


class Case(NamedTuple):
    """One mistake: on which host, what is done with it, and what must be said."""

    name: str
    make: Callable[[], nn.Module]
    act: Callable[[nn.Module, Path], Any]
    error: type[Exception]
    says: str


def wrap(recipe: Any) -> Callable[[nn.Module, Path], Any]:
    return lambda host, _: tokenprune.wrap(host, recipe)


def staged(*stages: tuple[int, float]) -> Callable[[nn.Module, Path], Any]:
    return wrap({"version": 1, "stages": [{"block": b, "keep_ratio": r} for b, r in stages]})


def wrap_file(text: str) -> Callable[[nn.Module, Path], Any]:
    def act(host: nn.Module, folder: Path) -> Any:
        (folder / "mine.yaml").write_text(text)
        return tokenprune.wrap(host, folder / "mine.yaml")

    return act


def wrap_twice(host: nn.Module, _: Path) -> Any:
    return tokenprune.wrap(tokenprune.wrap(host, RECIPE, verify=False, train=False), RECIPE)


def wrap_around(host: nn.Module, _: Path) -> Any:
    return tokenprune.wrap(
        nn.Sequential(tokenprune.wrap(host, RECIPE, verify=False, train=False), nn.ReLU()), RECIPE
    )


def call(images: Tensor) -> Callable[[nn.Module, Path], Any]:
    return lambda host, _: tokenprune.wrap(host, RECIPE, verify=False, train=False)(images)


def force(*sets: list[list[int]]) -> Callable[[nn.Module, Path], Any]:
    def act(host: nn.Module, _: Path) -> Any:
        model = tokenprune.wrap(host, RECIPE, verify=False, train=False)
        with model.using(keep_indices=[torch.tensor(kept) for kept in sets]):
            return model(IMAGES)

    return act


CASES = (
    Case(
        "unknown recipe",
        vit,
        wrap("dynamicvit-deit-smal-k0.7"),
        errors.UnknownRecipeError,
        r"dynamicvit-deit-smal-k0\.7'.*Did you mean 'dynamicvit-deit-small-k0\.7'",
    ),
    Case("typo in a key", vit, wrap({**RECIPE, "los": {}}), errors.RecipeError, r"los\b.*'loss'"),
    Case(
        "block out of range",
        vit,
        staged((1, 0.7), (12, 0.5)),
        errors.PlanError,
        r"at blocks \[12\], but the host has 3 blocks \(0 to 2\)",
    ),
    Case(
        "ratio of 0",
        vit,
        staged((1, 0.0)),
        errors.RecipeError,
        r"stages\.0\.keep_ratio: should be greater than 0, found 0\.0",
    ),
    Case(
        "ratio over 1",
        vit,
        staged((1, 1.2)),
        errors.RecipeError,
        r"stages\.0\.keep_ratio: .*equal to 1, found 1\.2",
    ),
    Case(
        "ratios that grow",
        vit,
        staged((1, 0.5), (2, 0.7)),
        errors.RecipeError,
        r"stages: keep_ratio grows from 0\.5 at block 1 to 0\.7 at block 2",
    ),
    Case(
        "two stages at one block",
        vit,
        staged((1, 0.7), (1, 0.5)),
        errors.RecipeError,
        "stages: two stages are at block 1",
    ),
    Case(
        "YAML tag",
        vit,
        wrap_file("version: 1\nname: !!python/object/apply:os.getcwd []\n"),
        errors.RecipeError,
        r"YAML tags are not allowed.*mine\.yaml.*line 2: tag .*os\.getcwd",
    ),
    Case(
        "CNN",
        cnn,
        wrap(RECIPE),
        errors.UnsupportedHostError,
        "No transformer block is found in ResNet",
    ),
    Case(
        "mixer without a rule",
        adding_up,
        wrap(RECIPE),
        errors.VerificationError,
        r"first at node 'flip'.*blocks\.2\.attn.*test_bad_input\.py:\d+: return self\.proj",
    ),
    Case("wrapped twice", vit, wrap_twice, errors.AlreadyWrappedError, "wrapped already.*unwrap"),
    Case(
        "wrapped inside",
        vit,
        wrap_around,
        errors.AlreadyWrappedError,
        "Module '0' of this Sequential is wrapped already",
    ),
    Case(
        "image of another size",
        vit,
        call(torch.zeros(2, 3, 40, 32)),
        errors.HostError,
        r"refused the input \{'x': \(2, 3, 40, 32\)\}.*Input height \(40\)",
    ),
    Case(
        "keep_indices out of range",
        vit,
        force([[0, 16]] * 2, [[0]] * 2),
        errors.KeepIndicesError,
        r"image 0 hold 16, but there are 16 patch tokens",
    ),
    Case(
        "keep_indices below 0",
        vit,
        force([[0, -1]] * 2, [[0]] * 2),
        errors.KeepIndicesError,
        r"image 0 hold -1, but there are 16 patch tokens",
    ),
    Case(
        "keep_indices repeated",
        vit,
        force([[0, 1], [3, 3]], [[0], [3]]),
        errors.KeepIndicesError,
        "image 1 hold 3 twice",
    ),
    Case(
        "NaN in the weights",
        with_nan,
        wrap(RECIPE),
        errors.NonFiniteWeightsError,
        r"'blocks\.1\.mlp\.fc1\.weight' of VisionTransformer holds 1 values that are NaN",
    ),
)


def state_of(host: nn.Module) -> list[Any]:
    """Everything a module holds, by identity, and the values of its tensors."""
    held: list[Any] = [
        (path, sorted(vars(module)), module.training, len(module._forward_hooks))
        for path, module in host.named_modules()
    ]
    tensors = {**dict(host.named_parameters()), **dict(host.named_buffers())}
    held += [(name, id(t), t.requires_grad, t.grad is None) for name, t in tensors.items()]
    return held


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_told_and_leaves_the_host_as_it_was(case: Case, tmp_path: Path) -> None:
    host = case.make().train()
    host.get_submodule("conv1" if case.make is cnn else "blocks.0").eval()
    before, weights = state_of(host), {k: v.clone() for k, v in host.state_dict().items()}
    with pytest.raises(case.error, match=f"(?s){case.says}") as caught:
        case.act(host, tmp_path)
    assert isinstance(caught.value, errors.TokenPruneError)
    assert state_of(host) == before
    assert host.state_dict().keys() == weights.keys()
    for name, value in host.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), weights[name].nan_to_num(7.0)), name


def test_a_host_that_was_refused_can_be_wrapped_after_all() -> None:
    host = vit().eval()
    with torch.no_grad():
        dense = host(IMAGES)
    for recipe in ({**RECIPE, "los": {}}, {**RECIPE, "stages": []}):
        with pytest.raises(errors.RecipeError, match=r"los|stages"):
            tokenprune.wrap(host, recipe)
    with torch.no_grad():
        assert torch.equal(host(IMAGES), dense)
    assert tokenprune.unwrap(tokenprune.wrap(host, RECIPE)) is host
