"""Theorem 9 where what Python reads is held by something else: a closure, a class, a reference."""

import array
import io
import itertools
import logging
import math
import re
import sys
import threading
import time
import weakref
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.theorems.test_9_places import (
    IMAGES,
    Plain,
    check_it_is_seen,
    reads_all,
    whole,
    wrapped,
)
from tests.theorems.test_9_places import Place as Held
from tests.toys.vit import Block, Vit
from tokenprune.errors import (
    AlreadyWrappedError,
    HostError,
    PlanError,
    TokenPruneWarning,
    TraceError,
    UnsupportedHostError,
)


def reader(config: Plain) -> Callable[[Any], float]:
    return lambda s: config.own


def by_default(s: Any, config: Plain = Plain()) -> float:  # noqa: B008  a default is the case
    return config.own


class MakesUp:
    def __getattr__(self, name: str) -> Any:
        if name == "own":
            return STORE[0]
        raise AttributeError(name)


def beside(size: torch.Size, config: Plain) -> Callable[[Any], float]:
    return lambda s: config.own * size[0]


Pair = namedtuple("Pair", "own")


class Words(set[str]):
    pass


class Ring(deque[float]):
    pass


class Finds(dict[str, float]):
    pass


FINDS = Finds(own=1.0)
WEAK_KEYS: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()


class Base:
    scale = 1.0

    @classmethod
    def read(cls) -> float:
        return cls.scale


class Derived(Base):
    pass


class Called:
    def __call__(self) -> float:
        return 1.0


class Slots:
    __slots__ = ("inner", "own")

    def __init__(self, inner: Any = None) -> None:
        self.inner, self.own = inner, 1.0


class Lazy(OrderedDict[str, Any]):
    """As the tables of models in transformers, which import what they hold."""

    def items(self) -> Any:
        raise ImportError("a trace looked into it")

    keys = values = __iter__ = items


LAZY = Lazy(a=1)  # every test here traces a host of this file


def imported(s: Any) -> float:
    import settings_of_a_test  # type: ignore[import-not-found]

    return settings_of_a_test.scale  # type: ignore[no-any-return]


class Speaks(type):
    @property
    def own(cls) -> float:
        return STORE[0]


class OfMeta(metaclass=Speaks):
    pass


class Mode(Enum):
    FAST = 1


Mode.FAST.own = 1.0  # type: ignore[attr-defined]
LOG = logging.getLogger("of a test")
LOG.setLevel(logging.INFO)
STORE, TABLE, CONFIG, OF_CLOSURE = [1.0], {"own": 1.0}, Plain(), Plain()
MODULE: Any = ModuleType("settings_of_a_test")
MODULE.scale = 1.0
sys.modules["settings_of_a_test"] = MODULE
DEEP = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(d=Plain()))))
OF_LIST = [Plain() for _ in range(200)]


def own(thing: Any) -> Callable[[Any, float], Any]:
    return lambda s, v: setattr(thing, "own", v)


def scale(thing: Any) -> Callable[[Any, float], Any]:
    return lambda s, v: setattr(thing, "scale", v)


def in_store(s: Any, v: float) -> None:
    STORE[0] = v


def in_table(s: Any, v: float) -> None:
    TABLE["own"] = v


def level(s: Any, v: float) -> None:
    LOG.setLevel(logging.INFO if v == 1 else logging.DEBUG)


def marked(s: Any, v: float) -> None:
    vars(s).pop("q_new") if v == 1 else setattr(s, "q_new", 1)


def changed_dtype(s: Any, v: float) -> None:
    torch.set_default_dtype(torch.float32 if v == 1 else torch.float64)


# What the block holds, how its forward reads the number, how it is changed.
HOLDERS: dict[str, Held] = {
    "closure": (None, reader(OF_CLOSURE), own(OF_CLOSURE)),
    "closure_beside_a_size": (None, beside(torch.Size([1]), OF_CLOSURE), own(OF_CLOSURE)),
    "named_tuple_in_a_list": (
        [Pair(1.0)], lambda s: s.held[0].own, lambda s, v: s.held.__setitem__(0, Pair(v))
    ),
    "ordered_dict_in_a_tuple": (
        (OrderedDict(own=1.0), torch.Size([1])), lambda s: s.held[0]["own"],
        lambda s, v: s.held[0].update(own=v),
    ),
    "kind_of_set": (
        Words(), lambda s: 3.0 if "on" in s.held else 1.0,
        lambda s, v: s.held.add("on") if v > 1 else s.held.clear(),
    ),
    "kind_of_deque": (Ring([1.0]), lambda s: s.held[0], lambda s, v: s.held.__setitem__(0, v)),
    "keys_that_are_weak": (
        None, lambda s: WEAK_KEYS.get(s, 1.0), lambda s, v: WEAK_KEYS.__setitem__(s, v)
    ),
    "what_a_dict_makes": (
        defaultdict(lambda: 1.0), lambda s: s.held.default_factory(),
        lambda s, v: setattr(s.held, "default_factory", lambda: v),
    ),
    "look_up_of_a_dicts_class": (
        None, lambda s: FINDS["own"],
        lambda s, v: setattr(Finds, "__getitem__", lambda self, name: v),
    ),
    "device_of_a_new_tensor": (
        None, lambda s: 3.0 if torch.empty(0).device.type == "meta" else 1.0,
        lambda s, v: torch.set_default_device(None if v == 1 else "meta"),
    ),
    "default": (None, lambda s: by_default(s), own(by_default.__defaults__[0])),  # type: ignore[index]
    "read_only_view": (MappingProxyType(TABLE), lambda s: s.held["own"], in_table),
    "chain_of_dicts": (ChainMap({}, TABLE), lambda s: s.held["own"], in_table),
    "bytes": (
        bytearray(b"\x01"), lambda s: float(s.held[0]), lambda s, v: s.held.__setitem__(0, int(v))
    ),
    "array": (
        array.array("d", [1.0]), lambda s: s.held[0], lambda s, v: s.held.__setitem__(0, v)
    ),
    "reference": (weakref.ref(CONFIG), lambda s: s.held().own, own(CONFIG)),
    "weak_values": (
        weakref.WeakValueDictionary(a=CONFIG), lambda s: s.held["a"].own, own(CONFIG)
    ),
    "event": (
        threading.Event(), lambda s: 3.0 if s.held.is_set() else 1.0,
        lambda s, v: s.held.set() if v > 1 else s.held.clear(),
    ),
    "partial_of_a_builtin": (partial(getattr, CONFIG, "own"), lambda s: s.held(), own(CONFIG)),
    "made_up": (MakesUp(), lambda s: s.held.own, in_store),
    "long_list": (OF_LIST, lambda s: s.held[150].own, own(OF_LIST[150])),
    "set": ({CONFIG}, lambda s: next(iter(s.held)).own, own(CONFIG)),
    "deep": (
        {"a": [{"b": [{"c": CONFIG}]}]}, lambda s: s.held["a"][0]["b"][0]["c"].own, own(CONFIG)
    ),
    "slots_in_slots": (
        Slots(Slots()), lambda s: s.held.inner.own, lambda s, v: setattr(s.held.inner, "own", v)
    ),
    "module": (MODULE, lambda s: s.held.scale, scale(MODULE)),
    "module_by_a_word": (None, lambda s: getattr(MODULE, "scale"), scale(MODULE)),  # noqa: B009
    "module_imported_by_the_function": (None, imported, scale(MODULE)),
    "globals": (None, lambda s: globals()["STORE"][0], in_store),
    "class": (Base, lambda s: s.held.scale, scale(Base)),
    "class_that_inherits": (None, lambda s: Derived.read(), scale(Derived)),
    "method_of_a_class": (Derived, lambda s: s.held.read(), scale(Derived)),
    "property_of_a_metaclass": (None, lambda s: OfMeta.own, in_store),
    "member_of_an_enum": (None, lambda s: Mode.FAST.own, own(Mode.FAST)),  # type: ignore[attr-defined]
    "call_of_an_object": (
        Called(), lambda s: s.held(), lambda s, v: setattr(Called, "__call__", lambda self: v)
    ),
    "level_of_a_logger": (None, lambda s: 3.0 if LOG.isEnabledFor(logging.DEBUG) else 1.0, level),
    "object_of_a_file_five_deep": (None, lambda s: DEEP.a.b.c.d.own, own(DEEP.a.b.c.d)),
    "sign_of_zero": (
        [0.0], lambda s: 2 - math.copysign(1, s.held[0]),
        lambda s, v: s.held.__setitem__(0, 0.0 if v == 1 else -0.0),
    ),
    "names_by_dir": (None, lambda s: 1.0 + len([n for n in dir(s) if n[:2] == "q_"]), marked),
    "names_by_vars": (None, lambda s: 1.0 + len([n for n in vars(s) if n[:2] == "q_"]), marked),
    "dtype_of_a_new_tensor": (
        None, lambda s: 3.0 if torch.tensor(1.0).dtype == torch.float64 else 1.0, changed_dtype
    ),
}  # fmt: skip


# A change traces its whole host again, so each of several hosts reads a part of them.
GROUP = 8
PARTS = {n: place // GROUP for place, n in enumerate(HOLDERS)}


@pytest.fixture(scope="module")
def hosts() -> dict[int, Any]:
    return {}


@pytest.mark.parametrize("name", HOLDERS)
def test_9_a_number_is_seen_whatever_holds_it(name: str, hosts: dict[int, Any]) -> None:
    part = PARTS[name]
    if part not in hosts:
        hosts[part] = reads_all({n: HOLDERS[n] for n in PARTS if PARTS[n] == part})
    with torch.no_grad():
        check_it_is_seen(hosts[part], name, HOLDERS[name])


def odd(read: Callable[[Any, Tensor], Any], **attributes: Any) -> nn.Module:
    """A host whose last block multiplies by what `read` gives."""

    class Odd(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x) * read(self, x)

    torch.manual_seed(0)
    host = Vit().eval()
    host.blocks[2].__class__ = Odd
    for name, value in attributes.items():
        setattr(host.blocks[2], name, value)
    return host


def rebound(s: Any, x: Tensor) -> Tensor:
    s.center = s.center * 0.9 + x.mean().detach()
    return 1.0 + s.center


def into(s: Any, x: Tensor) -> Tensor:
    torch.add(s.center, 1, out=s.center)
    return 1.0 + s.center


def registered(s: Any, x: Tensor) -> Tensor:
    s.register_buffer("center", x.mean().detach())
    return 1.0 + s.center


@pytest.mark.parametrize("write", [rebound, into, registered])
def test_9_a_buffer_that_forward_rebinds_is_written(write: Callable[[Any, Tensor], Tensor]) -> None:
    host, plain = odd(write), odd(write)
    for each in (host, plain):
        each.blocks[2].register_buffer("center", torch.zeros(()))
    model = wrapped(host)
    assert not host.blocks[2].center
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(whole(model), plain(IMAGES))
        torch.testing.assert_close(host.blocks[2].center, plain.blocks[2].center)


def test_9_a_plain_tensor_that_forward_counts_up_is_as_in_the_host() -> None:
    def count(s: Any, x: Tensor) -> float:
        s.steps += 1
        s.sum = s.sum + 1
        return 1.0

    host = odd(count, steps=torch.zeros(()), sum=torch.zeros(()))
    model = wrapped(host)
    assert (host.blocks[2].steps, host.blocks[2].sum) == (0, 0)
    whole(model)
    whole(model)
    assert (host.blocks[2].steps, host.blocks[2].sum) == (2, 2)


def test_9_a_counter_counts_and_a_list_that_is_trimmed_is_refused() -> None:
    def count(s: Any, x: Tensor) -> float:
        s.sizes["n"] += 1
        return 1.0

    def trim(s: Any, x: Tensor) -> float:
        s.means.append(x.mean())
        del s.means[:-2]
        return 1.0

    host = odd(count, sizes=Counter())
    model = wrapped(host)
    for number in range(1, 4):
        whole(model)
        assert host.blocks[2].sizes == {"n": number}
    with pytest.raises(TraceError, match="takes some out, or puts it elsewhere than at the end"):
        wrapped(odd(trim, means=[]))


@torch.no_grad()
def test_9_another_forward_of_the_hosts_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Vit):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    model = wrapped(Own().eval())
    before = model(IMAGES)
    monkeypatch.setattr(Own, "forward", lambda self, a, x: Vit.forward(self, x) * a)
    assert torch.equal(model(2, IMAGES), 2 * before)


def test_9_a_hook_that_changes_what_is_read_later_is_refused() -> None:
    host = odd(lambda s, x: s.k, k=1.0)
    model = wrapped(host)
    host.blocks[0].register_forward_hook(lambda *_: setattr(host.blocks[2], "k", 2.0))
    with pytest.raises(HostError, match="A hook inside of Vit changed 'k' of a Odd"):
        whole(model)
    host.blocks[0]._forward_hooks = OrderedDict()  # as good as `clear`
    whole(model)
    seen = list[Tensor]()
    host.blocks[0].register_forward_hook(lambda _m, _a, output: seen.append(output))
    whole(model)
    assert len(seen) == 1


def test_9_a_rate_of_dropout_that_the_host_reads_is_seen() -> None:
    host = odd(lambda s, x: 1.0 + s.drop(x) * 0 + s.drop.p, drop=nn.Dropout(0.0))
    model = wrapped(host)
    before = whole(model)
    host.blocks[2].drop.p = 0.5
    with torch.no_grad():
        torch.testing.assert_close(whole(model), host(IMAGES))
    assert not torch.equal(whole(model), before)


def test_9_an_attention_that_was_put_in_the_place_of_torchs_is_traced_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def explicit(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", explicit)
    host = odd(lambda s, x: 1.0 + F.scaled_dot_product_attention(x, x, x))
    host.num_prefix_tokens = 1  # type: ignore[assignment]
    model = wrapped(host)
    tokenprune.verify(model, IMAGES)  # raises
    targets = [n.target for n in next(iter(model._pruning.cache)).analysis.traced.graph.nodes]
    assert explicit not in targets


def test_9_what_adapters_read_is_watched_too() -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    host = timm.models.VisionTransformer(**shape).eval()  # of a family whose adapter reads it
    model = wrapped(host)
    model(IMAGES)
    assert model._pruning.plan.num_prefix == 1
    host.num_prefix_tokens = 3
    model(IMAGES)
    assert model._pruning.plan.num_prefix == 3


def test_9_another_kind_of_module_at_the_same_place_is_looked_at_anew() -> None:
    class Mixes(Block):
        def __init__(self) -> None:
            super().__init__()
            self.local: nn.Module = nn.Identity()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = super().forward(x)
            return x + self.local(x.transpose(1, 2)).transpose(1, 2)

    host = Vit(block=Mixes).eval()
    model = wrapped(host)
    host.blocks[2].local = nn.BatchNorm1d(16).eval()  # per channel
    whole(model)
    host.blocks[2].local = nn.AdaptiveAvgPool1d(65)  # of the tokens there are
    with pytest.raises(UnsupportedHostError, match="cannot run with fewer tokens"):
        whole(model)
    for block in host.blocks:
        block.local = nn.Conv1d(16, 16, 3, padding=1)
    with pytest.raises(PlanError, match="it keeps a grid of tokens"):
        whole(model)


def test_9_a_part_that_is_wrapped_as_well_is_refused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = Vit()

        def forward(self, x: Tensor) -> Any:
            return self.vit(x)

    host = Outer().eval()
    model = wrapped(host)
    host.vit = wrapped(host.vit)
    with pytest.raises(AlreadyWrappedError, match="This Vit is wrapped, and is a part of a model"):
        model(IMAGES)


def test_9_a_pair_of_hooks_that_changes_a_number_and_restores_it_is_refused() -> None:
    host = odd(lambda s, x: s.k, k=1.0)
    model = wrapped(host)
    host.blocks[2].register_forward_pre_hook(lambda block, _: setattr(block, "k", 2.0))
    host.blocks[2].register_forward_hook(lambda block, *_: setattr(block, "k", 1.0))
    with pytest.raises(HostError, match="A hook inside of Vit changed 'k' of a Odd"):
        whole(model)
    assert host.blocks[2].k == 2.0


def test_9_a_comparison_of_types_is_said_to_be_false() -> None:
    def compare(s: Any, x: Tensor) -> float:
        return 1.0 if type(s.gamma1) is nn.Parameter else 2.0

    with pytest.warns(TokenPruneWarning, match=r"compares type\(...\) with a class of tensors at"):
        wrapped(odd(compare))


@torch.no_grad()
def test_9_the_class_of_an_input_and_marks_on_it_are_seen() -> None:
    class Special(Tensor):
        pass

    class Asks(Vit):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * (2 if isinstance(x, Special) else getattr(x, "mark", 1))

    model = wrapped(Asks().eval())
    plain, marked = model(IMAGES), IMAGES.clone()
    marked.mark = 3  # type: ignore[attr-defined]
    assert torch.equal(model(marked), 3 * plain)
    assert torch.equal(model(IMAGES.as_subclass(Special)).as_subclass(Tensor), 2 * plain)


def test_9_a_function_of_torch_that_was_replaced_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda *args, **kwargs: softmax(*args, **kwargs) * 3)
    with pytest.raises(TraceError, match="was put in the place of torch's softmax and calls it"):
        wrapped(odd(lambda s, x: F.softmax(x, -1)))


def test_9_weights_can_be_swapped_after_wrap() -> None:
    host = Vit().eval()
    model = wrapped(host)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert host.head.weight.dtype == torch.float64


def from_a_file(s: Any, x: Tensor) -> float:
    with open(s.held, encoding="utf-8") as file:  # noqa: PTH123  this call is the case
        return float(file.read())


def by_its_path(s: Any, x: Tensor) -> float:
    return float(Path(s.held).read_text(encoding="utf-8"))


Read = Callable[[Any, Tensor], Any]
UNSEEN: dict[str, tuple[str, Any, Read]] = {
    "iterator": ("Odd.held", itertools.count(1), lambda s, x: next(s.held)),
    "buffer": ("Odd.held", io.StringIO("1"), lambda s, x: float(s.held.getvalue())),
    "mock": ("Odd.held", mock.Mock(return_value=1.0), lambda s, x: s.held()),
    "mock_that_says_it_is_a_list": ("Odd.held", mock.Mock(spec=list), lambda s, x: len([s.held])),
    "file": ("builtins.open", None, from_a_file),
    "path": ("io.open", None, by_its_path),
    "clock": ("time.time", 1.0, lambda s, x: 2.0 if time.time() < s.held else 1.0),
    "clock_by_another_name": ("time.perf_counter", 1.0, lambda s, x: min(s.held, perf_counter())),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_9_what_nobody_can_watch_is_said(name: str, tmp_path: Path) -> None:
    what, held, read = UNSEEN[name]
    path = tmp_path / "scale"
    path.write_text("1", encoding="utf-8")
    host = odd(read, held=str(path) if held is None else held)
    with pytest.warns(TokenPruneWarning, match=f"cannot watch {what}: The forward of Vit"):
        wrapped(host)


@torch.no_grad()
def test_9_what_pythons_library_keeps_for_itself_is_no_matter() -> None:
    model = wrapped(odd(lambda s, x: 1.0 if re.match(s.held, "a") else 2.0, held="a"))
    before = whole(model)
    re.compile("a pattern that nobody has compiled")
    sys.modules["of_another_test"] = ModuleType("of_another_test")
    traced = tokenprune.cache_info(model).traced
    assert torch.equal(whole(model), before)
    assert tokenprune.cache_info(model).traced == traced
    del sys.modules["of_another_test"]


def test_9_a_file_that_is_only_written_is_no_matter(tmp_path: Path) -> None:
    def log(s: Any, x: Tensor) -> float:
        with open(s.held, mode="a", encoding="utf-8") as file:  # noqa: PTH123  the call is the case
            file.write("called")
        return 1.0

    wrapped(odd(log, held=str(tmp_path / "log")))
