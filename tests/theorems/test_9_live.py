"""Theorem 9 of docs/theorems.md (live): after any change to the host or to the wrapped model,
through either handle, the next call is that of a model wrapped anew after the change."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

import tokenprune
from tests.theorems.case import tensors
from tests.theorems.changes import CHANGES, UNDONE, NotHereError
from tests.zoo.rows import randomize_weights
from tokenprune.errors import HostError, TokenPruneError

# Of hooks that come after the proof: tested in runtime/test_hooks.py.
pytestmark = pytest.mark.filterwarnings("ignore:hook ")
RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.5}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EVERY: dict[str, Any] = {"path": "gather", "keep_indices": [torch.arange(16).expand(2, -1)] * 2}


def timm_vit(**options: Any) -> nn.Module:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.VisionTransformer(num_classes=5, **{**small, **options})


def timm_eva() -> nn.Module:
    return timm.models.Eva(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5
    )


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_labels=5,
        num_hidden_layers=3, num_attention_heads=2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


NEW = hasattr(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=0)), "layers")
HOSTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm_vit": (timm_vit, "blocks.1"),
    "timm_eva": (timm_eva, "blocks.1"),
    "hf_vit": (hf_vit, "vit.layers.1" if NEW else "vit.encoder.layer.1"),
}


def wrapped(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = make().eval()
        randomize_weights(host, 1.0)
        return tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()


def anew(model: Any) -> Any:
    """The host of `model` wrapped once more, with the same predictors."""
    fresh = tokenprune.wrap(tokenprune.unwrap(model), RECIPE, verify=False, train=False)
    fresh._pruning.added.update(model._pruning.added)
    return fresh


def agree(model: Any, images: Tensor, again: bool = True) -> None:
    """It gives the bits of a model wrapped anew, or (not `again`) with every token kept those of
    its host; or both refuse."""
    host, kept = tokenprune.unwrap(model), nullcontext() if again else model.using(**EVERY)
    with torch.no_grad(), kept:
        try:
            found = tensors(model(images))
        except TokenPruneError as error:
            with pytest.raises(type(error)):
                anew(model)(images)
            return
        expected = tensors((anew(model) if again else host)(images))
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def changes() -> Iterator[Any]:
    """Each change on each host; every third may be fast, on one host (tests/conftest.py)."""
    for number, name in enumerate([*CHANGES, *UNDONE]):
        for place, host in enumerate(HOSTS):
            fast = number % 9 == 3 * place
            yield pytest.param(name, host, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "host"), [*changes()])
def test_9_a_change_is_seen(name: str, host: str) -> None:
    make, path = HOSTS[host]
    model = wrapped(make)
    object.__setattr__(model, "example", IMAGES)
    before = tensors(model(IMAGES))
    through_host = len(name) % 2 == 0 and name != "double_precision"  # that leaves predictors
    handle = tokenprune.unwrap(model) if through_host else model
    try:
        scope = UNDONE[name](handle, path) if name in UNDONE else nullcontext()
        with scope:
            if name in CHANGES:
                CHANGES[name](handle, path)
            now = next(p.dtype for p in model.parameters())
            agree(model, IMAGES.to(now), again=host == "timm_vit")
    except NotHereError:
        pytest.skip("this host has nothing of that kind")
    if name in UNDONE:
        assert all(map(torch.equal, tensors(model(IMAGES)), before))


def test_9_what_the_host_alone_was_moved_to_is_refused() -> None:
    model = wrapped(timm_vit)
    tokenprune.unwrap(model).double()
    with pytest.raises(
        HostError, match=r"is torch.float64 on cpu now, but what wrap added.*model.to"
    ):
        model(IMAGES.double())
    model.double()
    agree(model, IMAGES.double())


def test_9_toggling_traces_once_for_each_state() -> None:
    model = wrapped(timm_vit)
    CHANGES["a_lora_layer"](model, "blocks.1")
    layer = next(m for m in model.modules() if type(m).__name__ == "LowRank")
    before = tokenprune.cache_info(model).traced
    for _ in range(10):
        layer.active = not layer.active
        model(IMAGES)
    assert tokenprune.cache_info(model).traced == before + 2


def test_9_a_schedule_lets_the_oldest_program_go() -> None:
    model = wrapped(timm_vit)
    tokenprune.clear_cache(model, limit=3)
    for step in range(5):
        model.blocks[1].norm1.eps = 0.1 * (step + 1)
        agree(model, IMAGES)
    assert tokenprune.cache_info(model).programs == 3
    with pytest.raises(ValueError, match="limit of 0 programs"):
        tokenprune.clear_cache(model, limit=0)


def test_9_frozen_guards_see_modes_weights_and_new_hooks_alone() -> None:
    model = wrapped(timm_vit)
    before = model(IMAGES)
    tokenprune.freeze_guards(model)
    CHANGES["an_own_forward_of_a_block"](model, "blocks.1")
    assert torch.equal(model(IMAGES), before)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert not torch.equal(model(IMAGES), before)
    ran = list[nn.Module]()
    model.blocks[0].register_forward_hook(lambda module, _, __: ran.append(module))
    model(IMAGES)
    assert ran == [model.blocks[0]]
    tokenprune.freeze_guards(model, frozen=False)
    agree(model, IMAGES)


def test_9_two_wrappers_of_one_host_see_each_others_changes() -> None:
    model = wrapped(timm_vit)
    other = anew(model)
    model.reset_classifier(3)
    assert other(IMAGES).shape == (2, 3)
    del other.blocks[-1]
    agree(model, IMAGES)
    assert len(tokenprune.unwrap(model).blocks) == 2


class Life(RuleBasedStateMachine):
    """Any of it, in any order."""

    @initialize(host=st.sampled_from(sorted(HOSTS)))
    def begin(self, host: str) -> None:
        make, self.path = HOSTS[host]
        self.model, self.images = wrapped(make), IMAGES
        object.__setattr__(self.model, "example", IMAGES)

    @rule(name=st.sampled_from(sorted(set(CHANGES) - {"double_precision"})), host=st.booleans())
    def change(self, name: str, host: bool) -> None:
        handle = tokenprune.unwrap(self.model) if host else self.model
        try:
            CHANGES[name](handle, self.path)
        except (NotHereError, TokenPruneError, AttributeError):
            return  # nothing of that kind, or not any more

    @rule()
    def call(self) -> None:
        self.model.eval()
        agree(self.model, self.images)

    @rule()
    def train(self) -> None:
        self.model.train()
        try:
            returned = tensors(self.model(self.images))
        except TokenPruneError:
            return
        returned[0].float().square().mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad.clamp(-1, 1)
        self.model.zero_grad()

    @rule()
    def copy_it(self) -> None:
        try:
            copy.deepcopy(tokenprune.unwrap(self.model))
        except RuntimeError:
            return  # torch copies no tensor that was computed, such as a pruned weight
        self.model = copy.deepcopy(self.model)

    @rule()
    def wrap_again(self) -> None:
        try:
            self.model = anew(self.model)
        except TokenPruneError:
            return


Life.TestCase.settings = settings(max_examples=4, stateful_step_count=8, deadline=None)
test_9_any_order = pytest.mark.slow(Life.TestCase)
