"""Theorem 9 where Python keeps a number: wherever a host's code reads it, a change is seen."""

import threading
import traceback
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch import get_float32_matmul_precision as precision_now

import tokenprune
from tests.toys.vit import Block, Vit
from tokenprune.errors import HostError, TraceError, UnsupportedHostError

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EVERY = [torch.arange(64).expand(2, -1)] * 2


class Plain:
    scale = 1.0

    def __init__(self) -> None:
        self.own = 1.0

    def read(self) -> float:
        return self.own


@dataclass(slots=True)
class Slotted:
    own: float = 1.0


@dataclass
class Equal:
    own: float = field(compare=False)


class Table:
    @staticmethod
    def read() -> float:
        return NUMBERS["static"]


def by_default(state: dict[str, float] = {"own": 1.0}) -> float:  # noqa: B006  a default is the case
    return state["own"]


def with_attribute() -> float:
    return with_attribute.scale  # type: ignore[attr-defined,no-any-return]


def of_closure() -> tuple[Callable[[], float], Callable[[float], None]]:
    held = 1.0

    def change(value: float) -> None:
        nonlocal held
        held = value

    return lambda: held, change


class Named(NamedTuple):
    own: list[float]


class Special(nn.Parameter):
    pass


def one(state: dict[str, float]) -> float:
    return state["own"]


with_attribute.scale = 1.0  # type: ignore[attr-defined]
NUMBERS = {"static": 1.0}
DEEP, CONFIGS = SimpleNamespace(inner=Plain()), [Plain()]
CONTEXT: ContextVar[float] = ContextVar("CONTEXT", default=1.0)
LOCAL = threading.local()
LOCAL.own = 1.0
FUNCTIONS: dict[str, Callable[[], float]] = {"read": Table.read}
READ_CLOSURE, CHANGE_CLOSURE = of_closure()
SHARED = {"own": 1.0}

Place = tuple[Any, Callable[[Any], float], Callable[[Any, float], Any]]
# What the block holds, how its forward reads the number, how it is changed.
PLACES: dict[str, Place] = {
    "absent": (None, lambda s: getattr(s, "extra", 1.0), lambda s, v: setattr(s, "extra", v)),
    "absent_of_a_config": (
        Plain(), lambda s: getattr(s.held, "extra", 1.0), lambda s, v: setattr(s.held, "extra", v)
    ),
    "vars": (1.0, lambda s: vars(s)["held"], lambda s, v: setattr(s, "held", v)),
    "list_of_configs": (
        [Plain()], lambda s: s.held[0].own, lambda s, v: setattr(s.held[0], "own", v)
    ),
    "namespace": (
        SimpleNamespace(own=1.0), lambda s: s.held.own, lambda s, v: setattr(s.held, "own", v)
    ),
    "slots": (Slotted(), lambda s: s.held.own, lambda s, v: setattr(s.held, "own", v)),
    "bound_method": (
        Plain().read, lambda s: s.held(), lambda s, v: setattr(s.held.__self__, "own", v)
    ),
    "deque": (deque([1.0]), lambda s: s.held[0], lambda s, v: s.held.__setitem__(0, v)),
    "user_dict": (
        UserDict(own=1.0), lambda s: s.held["own"], lambda s, v: s.held.__setitem__("own", v)
    ),
    "array": (
        np.ones(3), lambda s: float(s.held[1]), lambda s, v: s.held.__setitem__(1, v)
    ),
    "partial": (
        partial(one, SHARED), lambda s: s.held(), lambda s, v: SHARED.__setitem__("own", v)
    ),
    "function_attribute": (
        None, lambda s: with_attribute(), lambda s, v: setattr(with_attribute, "scale", v)
    ),
    "default": (
        None, lambda s: by_default(), lambda s, v: by_default.__defaults__[0].update(own=v)
    ),
    "closure": (None, lambda s: READ_CLOSURE(), lambda s, v: CHANGE_CLOSURE(v)),
    "class_by_name": (None, lambda s: Plain.scale, lambda s, v: setattr(Plain, "scale", v)),
    "static_method": (None, lambda s: Table.read(), lambda s, v: NUMBERS.update(static=v)),
    "table_of_functions": (
        None, lambda s: FUNCTIONS["read"](), lambda s, v: NUMBERS.update(static=v)
    ),
    "global_object_in_an_object": (
        None, lambda s: DEEP.inner.own, lambda s, v: setattr(DEEP.inner, "own", v)
    ),
    "global_list_of_configs": (
        None, lambda s: CONFIGS[0].own, lambda s, v: setattr(CONFIGS[0], "own", v)
    ),
    "context_variable": (None, lambda s: CONTEXT.get(), lambda s, v: CONTEXT.set(v)),
    "thread_local": (None, lambda s: LOCAL.own, lambda s, v: setattr(LOCAL, "own", v)),
    "own_class": (
        None, lambda s: type(s).scale, lambda s, v: setattr(type(s), "scale", v)
    ),
    "mark_of_a_parameter": (
        None, lambda s: s.gamma1.mark, lambda s, v: setattr(s.gamma1, "mark", v)
    ),
    "mark_absent_on_a_parameter": (
        None, lambda s: getattr(s.gamma1, "extra", 1.0), lambda s, v: setattr(s.gamma1, "extra", v)
    ),
    "type_in_a_list": (
        [[1.0]], lambda s: 1.0 if type(s.held[0][0]) is float else 3.0,
        lambda s, v: s.held[0].__setitem__(0, 1.0 if v == 1 else 1),
    ),
    "type_of_a_number": (
        1, lambda s: 1.0 if type(s.held) is int else 3.0,
        lambda s, v: setattr(s, "held", 1 if v == 1 else True),
    ),
    "order_of_a_dict": (
        {"a": 1, "b": 2}, lambda s: 1.0 if next(iter(s.held)) == "a" else 3.0,
        lambda s, v: setattr(s, "held", {"a": 1, "b": 2} if v == 1 else {"b": 2, "a": 1}),
    ),
    "equal_object": (
        Equal(1.0), lambda s: s.held.own, lambda s, v: setattr(s, "held", Equal(v))
    ),
    "setting_of_torch": (
        None, lambda s: 1.0 if torch.get_float32_matmul_precision() == "highest" else 3.0,
        lambda s, v: torch.set_float32_matmul_precision("highest" if v == 1 else "high"),
    ),
    "setting_by_a_name_of_its_own": (
        None, lambda s: 1.0 if precision_now() == "highest" else 3.0,
        lambda s, v: torch.set_float32_matmul_precision("highest" if v == 1 else "high"),
    ),
    "flag_of_a_backend": (
        None, lambda s: 3.0 if torch.backends.cudnn.benchmark else 1.0,
        lambda s, v: setattr(torch.backends.cudnn, "benchmark", v > 1),
    ),
    "flag_of_a_file": (
        None, lambda s: 1.0 if torch.utils.deterministic.fill_uninitialized_memory else 3.0,
        lambda s, v: setattr(torch.utils.deterministic, "fill_uninitialized_memory", v == 1),
    ),
    "list_in_a_named_tuple": (
        Named([1.0]), lambda s: s.held.own[0], lambda s, v: s.held.own.__setitem__(0, v)
    ),
    "strides_of_a_tensor": (
        torch.ones(4, 3), lambda s: 1.0 if s.held.is_contiguous() else 3.0,
        lambda s, v: setattr(s, "held", torch.ones(4, 3) if v == 1 else torch.ones(3, 4).t()),
    ),
    "class_of_a_parameter": (
        None, lambda s: 3.0 if isinstance(s.gamma1, Special) else 1.0,
        lambda s, v: setattr(s, "gamma1", (nn.Parameter if v == 1 else Special)(s.gamma1.data)),
    ),
    "requires_grad_of_a_tensor": (
        torch.ones(()), lambda s: 3.0 if s.held.requires_grad else 1.0,
        lambda s, v: s.held.requires_grad_(v > 1),
    ),
    "table_of_buffers": (
        None, lambda s: 1.0 + len(s._buffers),
        lambda s, v: s.register_buffer("b", torch.ones(3)) if v > 1 else s._buffers.clear(),
    ),
}  # fmt: skip


def wrapped(host: nn.Module) -> Any:
    made = tokenprune.wrap(host, RECIPE, example_inputs=IMAGES, verify=False, train=False)
    return made.eval()


def reader(place: Place) -> nn.Module:
    """Multiplies by the number that a place gives."""
    held, read, _ = place

    class Reader(nn.Module):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * read(self)

    made: Any = Reader()
    made.held, made.gamma1 = held, nn.Parameter(torch.ones(()))
    made.gamma1.mark = 1.0
    return made  # type: ignore[no-any-return]


def host_that_reads(places: dict[str, Place]) -> Any:
    """A host whose last block reads a number in each of these places."""

    class Reads(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.readers(super().forward(x))  # type: ignore[no-any-return]

    host = Vit().eval()
    host.blocks[2].__class__ = Reads
    host.blocks[2].readers = nn.Sequential(OrderedDict((n, reader(p)) for n, p in places.items()))
    return host


def reads_all(places: dict[str, Place]) -> Any:
    """It wrapped."""
    return wrapped(host_that_reads(places))


def whole(model: Any, images: Tensor = IMAGES) -> Tensor:
    """With every token kept, as the host alone."""
    with torch.no_grad(), model.using("gather", keep_indices=EVERY):
        return model(images)  # type: ignore[no-any-return]


def wrapped_again(model: Any) -> Tensor:
    other = wrapped(tokenprune.unwrap(model))
    other.token_predictors.load_state_dict(model.token_predictors.state_dict())
    return other(IMAGES)  # type: ignore[no-any-return]


def check_it_is_seen(model: Any, name: str, place: Place) -> None:
    """A number is changed and changed back: each call is that of the host as it is then."""
    host, before, change = tokenprune.unwrap(model), whole(model), place[2]
    one = host.get_submodule(f"blocks.2.readers.{name}")
    try:
        change(one, 3.0)
        now = whole(model)
        assert not torch.equal(now, before)
        torch.testing.assert_close(now, host(IMAGES), check_dtype=False)
    finally:
        change(one, 1.0)
    traced = tokenprune.cache_info(model).traced
    assert torch.equal(whole(model), before)
    assert tokenprune.cache_info(model).traced - traced <= 1


@pytest.fixture(scope="module")
def reads_everywhere() -> Any:
    return reads_all(PLACES)


@pytest.mark.parametrize("name", PLACES)
@torch.no_grad()
def test_9_a_number_is_seen_wherever_it_is_kept(name: str, reads_everywhere: Any) -> None:
    check_it_is_seen(reads_everywhere, name, PLACES[name])


@torch.no_grad()
def test_9_weights_that_were_tied_are_read_in_their_own_places() -> None:
    host = Vit().eval()
    host.blocks[2].mlp[0].weight = host.blocks[1].mlp[0].weight
    model = wrapped(host)
    before = model(IMAGES)
    for block in host.blocks[1:]:
        block.mlp[0].weight = nn.Parameter(torch.randn_like(block.mlp[0].weight))
    assert not torch.equal(model(IMAGES), before)
    assert torch.equal(model(IMAGES), wrapped_again(model))


@pytest.mark.parametrize("holder", ["object", "list", "dict"])
@torch.no_grad()
def test_9_a_weight_that_another_object_holds_too_is_read_where_the_code_reads_it(
    holder: str,
) -> None:
    held: Any = {"object": Plain(), "list": [None], "dict": {}}[holder]

    class Block(type(Vit().blocks[2])):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            table = held.table if holder == "object" else held[0 if holder == "list" else "t"]
            return super().forward(x) * table

    host = Vit().eval()
    host.blocks[2].__class__ = Block
    gamma = host.blocks[2].gamma1
    gamma.mul_(1.5)
    if holder == "object":
        held.table = gamma
    else:
        held.__setitem__(0 if holder == "list" else "t", gamma)
    model = wrapped(host)
    before = model(IMAGES)
    host.blocks[2].gamma1 = nn.Parameter(gamma * 2)
    assert not torch.equal(model(IMAGES), before)
    assert torch.equal(model(IMAGES), wrapped_again(model))


class Listed(Vit):
    """A layer of it is in a list that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(16, 16)]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.hidden[0](x.mean((1, 2, 3))[:, None].expand(-1, 16)).mean(
            -1, keepdim=True
        )


@torch.no_grad()
def test_9_a_module_in_a_plain_list_has_hooks_and_a_forward_too() -> None:
    host, seen = Listed().eval(), list[torch.Size]()
    linear = host.hidden[0]
    model = wrapped(host)
    before = model(IMAGES)
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for _ in range(2):
        assert torch.equal(model(IMAGES), before)
    assert seen == [(2, 16)] * 2
    handle.remove()
    linear.forward = lambda x: x * 0 + 5
    assert not torch.equal(model(IMAGES), before)
    assert torch.equal(model(IMAGES), wrapped_again(model))


@torch.no_grad()
def test_9_how_inputs_lie_in_memory_is_seen_where_python_asks() -> None:
    class Asks(Vit):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * (1.0 if x.is_contiguous() else 3.0)

    host = Asks().eval()
    model = wrapped(host)
    last = IMAGES.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), 3 * model(IMAGES))
    assert tokenprune.cache_info(model).traced == 2


@torch.no_grad()
def test_9_two_arguments_may_be_one_tensor() -> None:
    class Two(Vit):
        def forward(self, x: Tensor, other: Tensor) -> Any:
            return super().forward(x) * (3.0 if other is x else 1.0)

    host, other = Two().eval(), IMAGES.clone()
    given = {"x": IMAGES, "other": other}
    made = tokenprune.wrap(host, RECIPE, example_inputs=given, verify=False, train=False)
    model: Any = made.eval()
    assert torch.equal(model(IMAGES, IMAGES), 3 * model(IMAGES, other))


def test_9_a_gradient_that_forward_reads_is_refused() -> None:
    class Asks(Vit):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * (1.0 if self.blocks[0].gamma1.grad is None else 2.0)

    with pytest.raises(TraceError, match="`grad` of a tensor, which is another in every step"):
        wrapped(Asks().eval())


@torch.no_grad()
def test_9_a_hook_of_the_host_may_go() -> None:
    class Hooked(Vit):
        def double(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output * 2

    host = Hooked().eval()
    handle = host.blocks[1].mlp.register_forward_hook(host.double)
    model = wrapped(host)
    before = model(IMAGES)
    handle.remove()
    assert not torch.equal(model(IMAGES), before)
    assert torch.equal(model(IMAGES), wrapped_again(model))
    host.blocks[2].mlp.register_forward_hook(host.double)
    assert torch.equal(model(IMAGES), wrapped_again(model))


def test_9_a_forward_set_on_the_host_is_refused() -> None:
    host = Vit().eval()
    model = wrapped(host)
    forward = host.forward
    host.forward = lambda x: forward(x)
    with pytest.raises(UnsupportedHostError, match="replaced on the host object after wrap"):
        model(IMAGES)
    del host.forward
    model(IMAGES)


def test_9_more_prefix_tokens_are_seen() -> None:
    host = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5
    ).eval()
    model = wrapped(host)
    host.reg_token = nn.Parameter(torch.randn(1, 4, 16))
    host.num_prefix_tokens, host.num_reg_tokens = 5, 4
    host.pos_embed = nn.Parameter(torch.randn(1, 21, 16))
    with torch.no_grad():
        assert torch.equal(model(IMAGES), wrapped_again(model))
    assert tokenprune.verify(model).num_prefix_tokens == 5


def test_9_threads_that_ask_for_a_method_at_once_leave_the_blocks_alone() -> None:
    host = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5
    ).eval()
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False, restore=False).eval()
    together, failed = threading.Barrier(3), list[BaseException]()

    def call() -> None:
        together.wait()
        try:
            with torch.no_grad():
                model.forward_features(IMAGES)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, "".join(traceback.format_exception(failed[0]))
    assert not any("forward" in vars(block) for block in host.blocks)


def test_9_a_method_that_yields_between_blocks_is_refused_and_others_yield() -> None:
    class Streams(Vit):
        def stream(self, x: Tensor) -> Any:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
                yield x

        def names(self) -> Any:
            yield from ("a", "b")

    model = wrapped(Streams().eval())
    assert list(model.names()) == ["a", "b"]
    with pytest.raises(HostError, match=r"stream\(\) of a wrapped model yields between the host"):
        list(model.stream(IMAGES))
    with model.using("dense"):
        assert len(list(model.stream(IMAGES))) == 3
