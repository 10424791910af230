"""Theorem 9 where a module itself is changed: its tables, what its class finds, its own forward."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import tokenprune
from tests.theorems.test_9_places import IMAGES, whole, wrapped
from tests.toys.vit import Block, Vit
from tokenprune.errors import LeakError
from tokenprune.runtime.step_values import hides_its_node


class Parts(nn.ModuleList):
    pass


class Odd(Block):
    """A block whose output depends on what may be None, and on what its class finds."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = super().forward(x) * self.gain
        for absent in (self.table, self.shift):
            x = x if absent is None else x + absent
        x = x if self.part is None else self.part(x)
        for part in self.parts:
            x = part(x)
        return self.idle(self.all_or_none(x))  # programs leave both out


def host() -> Any:
    torch.manual_seed(0)
    made = Vit().eval()
    block: Any = made.blocks[2]
    block.__class__ = type("Odd", (Odd,), {"__module__": __name__})  # of this host alone
    block.register_buffer("table", None)
    block.register_parameter("shift", None)
    block.register_module("part", None)
    parts = type("Parts", (Parts,), {"__module__": __name__})
    block.gain, block.parts = 2.0, parts([nn.Hardtanh(-0.3, 0.3), nn.Softplus()])
    block.all_or_none, block.idle = nn.Dropout(1.0).eval(), nn.Identity()
    return made


def reverse(parts: Any) -> Iterator[nn.Module]:
    return iter([*parts._modules.values()][::-1])


def other_table(block: Any) -> None:
    block.__setstate__(copy.deepcopy(block).__dict__)
    block.table = torch.ones(1)


def of_another(module: Any) -> None:
    other = copy.deepcopy(module)
    other.eps = 0.7
    module.__dict__ = other.__dict__


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a_buffer_that_was_none": lambda block: setattr(block, "table", torch.ones(1)),
    "a_parameter_that_was_none": lambda b: setattr(b, "shift", nn.Parameter(torch.ones(1))),
    "a_child_that_was_none": lambda block: setattr(block, "part", nn.Tanh()),
    "other_tables_and_a_buffer": other_table,
    "the_attributes_of_another": lambda block: of_another(block.norm1),
    "a_property_of_its_class": lambda b: setattr(type(b), "gain", property(lambda self: 0.5)),
    "the_order_that_its_class_gives": lambda b: setattr(type(b.parts), "__iter__", reverse),
    "the_mode_of_an_idle_part": lambda block: block.all_or_none.train(),
    "the_class_of_an_idle_part": lambda block: setattr(block.idle, "__class__", nn.Tanh),
    "the_forward_of_an_idle_part": lambda block: setattr(block.idle, "forward", torch.tanh),
    "a_hook_of_an_idle_part": lambda b: b.idle.register_forward_hook(lambda m, i, out: out * 2),
    "an_idle_part_of_another_class": lambda block: setattr(block, "idle", nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:hook ")
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_9_a_change_of_a_module_is_seen(name: str) -> None:
    dense = host()
    model = wrapped(dense)
    before = whole(model)
    CHANGES[name](dense.blocks[2])
    now = whole(model)
    assert not torch.equal(now, before)
    torch.testing.assert_close(now, dense(IMAGES))


@torch.no_grad()
def test_9_an_own_forward_of_torchs_module_that_mixes_tokens_does_not_leak() -> None:
    dense = Vit().eval()
    model = wrapped(dense)
    model(IMAGES)
    dense.blocks[2].mlp[1].forward = lambda x: F.gelu(x - 2 * x.mean(1, keepdim=True))
    kept = [torch.arange(0, 16, 2).expand(2, -1)] * 2
    outputs = []
    for path in ("mask", "gather"):
        with model.using(path, keep_indices=kept):
            outputs.append(model(IMAGES))
    torch.testing.assert_close(*outputs)


ZEROS = nn.Conv1d(24, 24, 3, padding=1)
nn.init.zeros_(ZEROS.weight)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "scan": lambda x: torch.cummax(x, 1)[0],
    "norm_over_tokens": lambda x: F.normalize(x, dim=1),
    "reduction": lambda x: x - torch.logsumexp(x, 1, keepdim=True),
    "tokens_beside_channels": lambda x: x - x.flatten(1).median(1)[0][:, None, None],
    "scan_known_by_its_place": lambda x: x.cumsum(1),
    "spread_of_tokens": lambda x: x / x.std(1, keepdim=True),
    "one_token_by_its_place": lambda x: x + x[:, 3:4],
    "number_of_tokens": lambda x: x / x.shape[1],
    "places_kept": torch.tril,
    "one_of_a_pair": lambda x: x - x.median(1, keepdim=True).values,
    "whether_any": lambda x: x + (x > 1).any(1, keepdim=True),
    "zero_until_trained": lambda x: x + ZEROS(x.mT).mT,
    "other_images": lambda x: x - x.mean(0),
    "an_image_by_its_place": lambda x: x + x[-1:],
    "how_many_numbers": lambda x: x / x.numel(),
    "tokens_by_given_places": lambda x: x + x.index_select(1, torch.tensor([5])),
    "halves_turned_around": lambda x: torch.cat((*x[:, 1:].chunk(2, 1)[::-1], x[:, :1]), 1),
    "turned_around": lambda x: x.flip(1),
    "scale_of_all": lambda x: x - x.reshape(2, -1).kthvalue(9, dim=1)[0].view(2, 1, 1),
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "norm_over_channels": lambda x: F.normalize(x, dim=-1),
    "scan_of_channels": lambda x: torch.cummax(x, -1)[0],
    "sorted_by_channel": lambda x: x.flatten(0, 1).topk(24, dim=1)[0].view_as(x),
    "scan_of_channels_known_by_place": lambda x: x.cumsum(-1) / x.std(-1, keepdim=True),
    "table": lambda x: x + torch.arange(x.shape[1])[:, None] * 0.1,
    "noise": lambda x: x + torch.rand_like(x) * 0,
    "prefix": lambda x: x + torch.celu(x[:, :1]),
}


@pytest.mark.parametrize("name", MIXING)
@torch.no_grad()
def test_9_what_comes_later_is_refused_if_it_mixes_tokens_or_images(name: str) -> None:
    model = wrapped(Vit().eval())
    before = model(IMAGES)
    model = copy.deepcopy(model) if name == "scan" else model
    activation = model.blocks[2].mlp[1]
    activation.forward = MIXING[name]
    for training in (False, True):
        with pytest.raises(LeakError, match=r"blocks\.2\.mlp.* mixes (tokens|images), and no "):
            model.train(training)(IMAGES)
    del activation.forward
    assert torch.equal(model.eval()(IMAGES), before)


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_9_an_operator_without_a_rule_that_comes_later_runs_if_tokens_stay_alone(
    name: str,
) -> None:
    model = wrapped(Vit().eval())
    model(IMAGES)
    model.blocks[2].mlp[1].forward = ALONE[name]
    kept = [torch.arange(0, 16, 2).expand(2, -1)] * 2
    outputs, state = [], torch.get_rng_state()
    for path in ("mask", "gather"):
        with model.using(path, keep_indices=kept):
            outputs.append(model(IMAGES))
    torch.testing.assert_close(*outputs)
    assert name == "noise" or torch.equal(torch.get_rng_state(), state)


def test_9_a_layer_that_changes_its_buffers_in_each_call_mixes_nothing() -> None:
    model = wrapped(Vit()).train()
    model(IMAGES)
    spectral_norm(model.blocks[2].mlp[0])
    u = model.blocks[2].mlp[0].parametrizations.weight[0]._u.clone()
    model(IMAGES).sum().backward()
    assert model.blocks[2].mlp[0].parametrizations.weight.original.grad.any()
    assert not torch.equal(model.blocks[2].mlp[0].parametrizations.weight[0]._u, u)


class PerImage(nn.Module):
    """Asks Python how many images there are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * torch.full((len(y), 1, 1), 0.5)


@torch.no_grad()
def test_9_as_many_images_as_another_dim_has_entries() -> None:
    dense = Vit().eval()
    model = wrapped(dense)
    dense.blocks[1].mlp = PerImage(dense.blocks[1].mlp)
    for count in (2, 3, 4):
        images = torch.cat([IMAGES, IMAGES])[:count]
        alone = [model(image[None]) for image in images]
        torch.testing.assert_close(model(images), torch.cat(alone))


class Float8(nn.Linear):
    """Keeps its weight in a dtype in which torch cannot compute."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * 0.01, self.bias)


class Sparse(nn.Linear):
    """Adds a sparse tensor to its weight."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([[0, 3, 5], [1, 2, 3]])
        added = torch.sparse_coo_tensor(places, torch.ones(3), self.weight.shape)
        return F.linear(x, self.weight + added, self.bias)


def with_sparse_part(layer: nn.Linear) -> None:
    layer.__class__ = Sparse


def in_float8(layer: nn.Linear) -> None:
    layer.__class__ = Float8
    weight = (layer.weight.detach() / 0.01).to(torch.float8_e4m3fn)
    layer.weight = nn.Parameter(weight, requires_grad=False)


def cast_by_hooks(layer: nn.Linear) -> None:
    def before(module: nn.Module, _: Any) -> None:
        module.to(torch.float32)

    def after(module: nn.Module, _: Any, output: Tensor) -> None:
        module.to(torch.bfloat16)

    layer.to(torch.bfloat16).register_forward_pre_hook(before)
    layer.register_forward_hook(after)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("store", [in_float8, cast_by_hooks, with_sparse_part])
@torch.no_grad()
def test_9_weights_may_be_stored_otherwise(store: Callable[[nn.Linear], None]) -> None:
    dense = Vit().eval()
    model = wrapped(dense)
    for layer in dense.blocks[1].mlp[::2]:
        store(layer)
    found = whole(model)
    torch.testing.assert_close(found, dense(IMAGES))
    again = wrapped(dense)
    torch.testing.assert_close(whole(again), found)


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x[:, 1:], x[:, :1]], dim=1)


@pytest.mark.parametrize("method", ["skip-k0.7", "bypass-k0.7"])
@pytest.mark.parametrize("mix", [shifted, MIXING["number_of_tokens"]])
@torch.no_grad()
def test_9_what_mixes_tokens_in_a_part_that_some_go_around_is_refused(
    method: str, mix: Callable[[Tensor], Tensor]
) -> None:
    model = tokenprune.wrap(Vit().eval(), method, example_inputs=IMAGES, train=False)
    model(IMAGES)
    model.blocks[2].mlp[1].forward = mix
    with pytest.raises(LeakError, match=r"mixes tokens"):
        model(IMAGES)
    model.blocks[2].mlp[1].forward = ALONE["norm_over_channels"]
    model(IMAGES)


class Gated(nn.Module):
    """Mixes tokens as soon as its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * shifted(x)


@torch.no_grad()
def test_9_weights_hide_nothing_that_training_opens() -> None:
    host = Vit().eval()
    model = wrapped(host)
    host.blocks[2].norm2 = nn.Sequential(host.blocks[2].norm2, Gated())
    with pytest.raises(LeakError, match=r"mixes tokens"):
        model(IMAGES)
    with pytest.raises(LeakError, match=r"mixes tokens"):
        tokenprune.wrap(copy.deepcopy(host), "merge-k0.7", example_inputs=IMAGES, train=False)
    assert hides_its_node(nn.Parameter(torch.eye(4)))
    assert not hides_its_node(nn.Parameter(torch.randn(4)))


@torch.no_grad()
def test_9_rows_that_nobody_read_are_read_by_what_comes_later() -> None:
    model = tokenprune.wrap(Vit().eval(), "exact", example_inputs=IMAGES, train=False)
    model(IMAGES)
    model.blocks[2].mlp[1].forward = lambda x: torch.fft.fftn(x, dim=(1, 2)).real
    with pytest.raises(LeakError, match=r"reads rows that `unread_rows` leaves out"):
        model(IMAGES)
