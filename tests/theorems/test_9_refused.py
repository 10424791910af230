"""Theorem 9 where a host cannot be served any more: the error names what changed and what to do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.theorems.test_9_places import IMAGES, RECIPE
from tokenprune.errors import HostError, PlanError, TokenPruneError, UnsupportedHostError


class Listed(timm.models.VisionTransformer):
    """Runs its blocks from a plain list."""

    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.order:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


class Other(Listed):
    """Gets another forward in a test."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Slots(timm.models.VisionTransformer):
    __slots__ = ("gain",)


def build(cls: Any = Listed) -> Any:
    host = cls(img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5).eval()
    host.order = list(host.blocks)
    return host


def wrapped(host: nn.Module) -> Any:
    return tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()


def scripted(model: Any) -> None:
    model.blocks[3].mlp = torch.jit.script(model.blocks[3].mlp)


def jit_traced(model: Any) -> None:
    model.head = torch.jit.trace(model.head, torch.ones(2, 16))


def compiled(model: Any) -> None:
    model.blocks[2] = torch.compile(model.blocks[2], backend="eager")


def another_order(model: Any) -> None:
    model.order[1], model.order[2] = model.order[2], model.order[1]


def a_block_in_the_list(model: Any) -> None:
    model.order.append(copy.deepcopy(model.blocks[3]))


def no_signature(model: Any) -> None:
    Other.forward.__wrapped__ = None  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[Callable[[Any], None], type[TokenPruneError], str]] = {
    "scripted": (
        scripted, UnsupportedHostError,
        r"Module 'blocks\.3\.mlp' of Other was made by torch\.jit .* Put the module back that",
    ),
    "jit_traced": (
        jit_traced, UnsupportedHostError, r"Module 'head' of Other was made by torch\.jit"
    ),
    "compiled": (
        compiled, UnsupportedHostError,
        r"Module 'blocks\.2' of Other was made by torch\.compile.*torch\.compile\(model\)",
    ),
    "another_order": (
        another_order, PlanError,
        r"Stage 1 \(block 2, 'blocks\.2'\) runs before stage 0 .* List them in the order in which",
    ),
    "a_block_in_the_list": (
        a_block_in_the_list, UnsupportedHostError,
        r"a Parameter that no module, .* Register its module \(nn\.ModuleList\)",
    ),
    "no_signature": (
        no_signature, UnsupportedHostError,
        r"Which arguments Other\.forward takes cannot be told: .* Define it by `def`",
    ),
}  # fmt: skip


@pytest.fixture
def forward_restored() -> Any:
    yield
    vars(Other.forward).pop("__wrapped__", None)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.usefixtures("forward_restored")
@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_9_a_change_that_nobody_can_serve_is_refused_by_name(name: str) -> None:
    change, error, said = REFUSED[name]
    model = wrapped(build(Other))
    model(IMAGES)
    change(model)
    with pytest.raises(error, match=said):
        model(IMAGES)
    with pytest.raises(error, match=said):
        wrapped(tokenprune.unwrap(model))


def test_9_a_host_with_slots_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match=r"Slots has __slots__ \(gain\).*Take __slots__"):
        wrapped(build(Slots))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_9_a_host_that_is_scripted_or_compiled_is_refused() -> None:
    with pytest.raises(UnsupportedHostError, match=r"The host itself was made by torch\.jit"):
        wrapped(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedHostError, match=r"The host itself was made by torch\.compile"):
        wrapped(torch.compile(nn.Linear(2, 2), backend="eager"))


@torch.no_grad()
def test_9_a_block_without_a_light_branch_is_refused() -> None:
    host = timm.models.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, window_size=4, depths=(1, 3), num_heads=(2, 4),
        num_classes=5,
    ).eval()  # fmt: skip
    model: Any = tokenprune.wrap(host, RECIPE | {"mode": "bypass"}, verify=False, train=False)
    model.eval()(IMAGES)
    model.layers[1].blocks.append(copy.deepcopy(model.layers[1].blocks[-1]))
    said = r"has changed since wrap: it would need .*\.4 for block 4, .* for blocks 1, 2, 3\. Call"
    with pytest.raises(HostError, match=said):
        model(IMAGES)
    wrapped_again = tokenprune.wrap(tokenprune.unwrap(model), RECIPE | {"mode": "bypass"})
    assert wrapped_again(IMAGES).shape == (2, 5)
