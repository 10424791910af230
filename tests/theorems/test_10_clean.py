"""Theorem 10 of docs/theorems.md (clean): after `wrap`, whether it succeeded or not, everything
else behaves as if it had never been called."""

import functools
import random
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import HostError, TokenPruneWarning, TraceError

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EVERY = [torch.arange(16).expand(2, -1)] * 2
KEPT: list[Any] = []


@functools.lru_cache
def table(length: int) -> Tensor:
    return torch.arange(float(length)).reshape(1, length, 1) / 100


class Host(timm.models.VisionTransformer):
    """Does something odd in its forward; `fails` raises at its end."""

    shared: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, fails: bool = False) -> None:
        super().__init__(
            img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5,
            class_token=False, global_pool="avg",
        )  # fmt: skip
        self.fails, self.last, self.history = fails, None, list[Tensor]()
        self.register_buffer("calls", torch.zeros(()))

    def odd(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(self.patch_embed(x) + self.pos_embed)
        y = self.head(self.fc_norm(self.norm(self.blocks(x)).mean(1)))
        if self.fails:
            raise RuntimeError("at the end")
        return y


class Cached(Host):
    def odd(self, x: Tensor) -> Tensor:
        return x + table(x.shape[1])


class OfTheClass(Host):
    def odd(self, x: Tensor) -> Tensor:
        if "table" not in Host.shared:
            Host.shared["table"] = torch.linspace(0, 1, 16)[:, None]
        return x + Host.shared["table"]


class CountsInABuffer(Host):
    def odd(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x


class KeepsTheLast(Host):
    def odd(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class Appends(Host):
    def odd(self, x: Tensor) -> Tensor:
        KEPT.append(x)
        return x


class Counts(Host):
    def __init__(self, fails: bool = False) -> None:
        super().__init__(fails)
        self.steps = 3

    def odd(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x


class Notes:
    def __init__(self) -> None:
        self.calls = 0


class TakesNotes(Host):
    """In all that an owner may look at: a list, a set, a dict, an object."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(fails)
        self.log, self.sizes, self.recent = list[int](), set[int](), deque[int](maxlen=2)
        self.stats: dict[str, Any] = {"owner": 1}
        self.notes = Notes()

    def odd(self, x: Tensor) -> Tensor:
        self.log.append(x.shape[1])
        self.recent.append(x.shape[1])
        self.sizes.add(x.shape[2])
        self.stats["mean"] = x.mean()
        self.notes.calls += 1
        return x


class NotesAll(Host):
    """Reads what it adds to, in a dict inside of a dict."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(fails)
        self.stats: dict[str, Any] = {"sizes": {}}

    def odd(self, x: Tensor) -> Tensor:
        sizes = self.stats["sizes"]
        sizes[len(sizes)] = x.shape[1]
        return x


COUNT = 0
LAST: ContextVar[int] = ContextVar("LAST", default=0)


@dataclass(slots=True)
class Slots:
    calls: int = 0


SLOTS = Slots()


def counter() -> tuple[Callable[[], None], Callable[[], int]]:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    return step, lambda: count


STEP, STEPS = counter()


def count_in_the_file() -> None:
    global COUNT
    COUNT += 1


def count_in_slots() -> None:
    SLOTS.calls += 1


def count_in_the_class() -> None:
    Calls.counted = getattr(Calls, "counted", 0) + 1  # type: ignore[attr-defined]


class Calls(Host):
    """Calls a function that changes something which no module holds."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self.function = function

    def odd(self, x: Tensor) -> Tensor:
        self.function()
        return x


# What the function changes, how it does, and what is there.
ELSEWHERE: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    r"sets tests.*test_10_clean.COUNT": (count_in_the_file, lambda: COUNT),
    r"sets Slots.calls": (count_in_slots, lambda: SLOTS.calls),
    r"sets Calls.counted": (count_in_the_class, lambda: getattr(Calls, "counted", 0)),
    r"sets ContextVar LAST": (lambda: LAST.set(1), LAST.get),
}


class Deletes(Host):
    def odd(self, x: Tensor) -> Tensor:
        if hasattr(self, "once"):
            del self.once
        return x


class Alternates(Counts):
    def odd(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x * 2 if self.steps % 2 else x


class SetsANumber(Host):
    gain = 1.0

    def train(self, mode: bool = True) -> Any:
        self.gain = 2.0 if mode else 1.0
        return super().train(mode)

    def odd(self, x: Tensor) -> Tensor:
        return x * self.gain


class SetsANumberOfTheClass(SetsANumber):
    def train(self, mode: bool = True) -> Any:
        type(self).gain = 2.0 if mode else 1.0
        return Host.train(self, mode)


class MergesWeights(Host):
    """As LoRA layers do: in eval a term is in the weight."""

    merged = True

    def train(self, mode: bool = True) -> Any:
        if mode == self.merged:
            self.merged = not mode
            self.pos_embed.data += -0.3 if mode else 0.3
        return super().train(mode)

    def odd(self, x: Tensor) -> Tensor:
        return x if self.merged else x + 0.3


class Freezes(Host):
    def train(self, mode: bool = True) -> Any:
        self.pos_embed.requires_grad_(not mode)
        self.pos_embed.data = self.pos_embed.data * 2 if mode else self.pos_embed.data / 2
        return super().train(mode)


class ReplacesAChild(Host):
    def eval(self) -> Any:
        self.norm = nn.Identity()
        return super().eval()


SWITCHES = (SetsANumber, SetsANumberOfTheClass, MergesWeights, Freezes, ReplacesAChild)
KINDS = (Cached, OfTheClass, CountsInABuffer, KeepsTheLast, Counts)


def everything(host: nn.Module) -> list[Any]:
    """What could hold something of a trace."""
    found: list[Any] = [dict(vars(module)) for module in host.modules()]
    found += [{n: t.clone() for n, t in host.state_dict().items()}, dict(Host.shared), list(KEPT)]
    return [*found, table.cache_info().currsize, random.getstate(), np.random.get_state()[1].sum()]


def fake(value: Any) -> bool:
    return type(value) not in (Tensor, nn.Parameter) and isinstance(value, Tensor)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, Appends], ids=lambda kind: kind.__name__)
def test_10_nothing_of_a_trace_remains(kind: type[Host], fails: bool) -> None:
    torch.manual_seed(0)
    host = kind(fails).eval()
    Host.shared.clear()
    table.cache_clear()
    before = everything(host)
    refused = fails or kind is Appends
    if refused:
        with pytest.raises(
            (TraceError, HostError), match="at the end" if fails else "kept in a list"
        ):
            tokenprune.wrap(host, RECIPE, verify=False)
    else:
        tokenprune.wrap(host, RECIPE, verify=False)
    after = everything(host)
    for was, now in zip(before, after, strict=True):
        if isinstance(was, dict) and was and all(isinstance(v, Tensor) for v in was.values()):
            assert all(torch.equal(was[name], now[name]) for name in was)
        elif isinstance(was, dict):
            assert was.keys() == now.keys()
            assert all(was[name] is now[name] or was[name] == now[name] for name in was)
        else:
            assert was == now
    assert "__getattribute__" not in vars(nn.Module)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SWITCHES, ids=lambda kind: kind.__name__)
def test_10_what_a_train_of_the_hosts_own_changes_is_put_back(
    kind: type[Host], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is SetsANumberOfTheClass:
        monkeypatch.setattr(kind, "gain", 1.0)  # for other tests
    torch.manual_seed(0)
    host = kind().eval().train(training)
    seen = [m.training for m in host.modules()], list(host.children()), getattr(host, "gain", None)
    held = {id(p): (p.data_ptr(), p.requires_grad, p.clone()) for p in host.parameters()}
    output = host(IMAGES)
    model = tokenprune.wrap(host, RECIPE)
    now = [m.training for m in host.modules()], list(host.children()), getattr(host, "gain", None)
    assert now == seen
    for parameter in host.parameters():
        memory, asked, values = held.pop(id(parameter))
        assert (parameter.data_ptr(), parameter.requires_grad) == (memory, asked)
        assert torch.equal(parameter, values)
    assert torch.equal(host(IMAGES), output)
    traced = tokenprune.cache_info(model).traced
    for mode in (True, False, True):
        model.train(mode)
        with torch.no_grad(), model.using("dense"):
            torch.testing.assert_close(model(IMAGES), host(IMAGES))
    assert tokenprune.cache_info(model).traced - traced <= (kind is ReplacesAChild)


@pytest.mark.parametrize("said", ELSEWHERE)
def test_10_what_a_program_does_not_repeat_is_said_and_put_back(said: str) -> None:
    function, now = ELSEWHERE[said]
    with pytest.warns(TokenPruneWarning, match=f"The forward of Calls {said}.*pruned call does"):
        tokenprune.wrap(Calls(function).eval(), RECIPE, verify=False, train=False)
    assert now() == 0


def test_10_what_closures_count_and_what_is_printed_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for said, function in (("sets count", STEP), ("prints", lambda: print("called"))):
        with pytest.warns(TokenPruneWarning, match=f"The forward of Calls {said} .*, which"):
            tokenprune.wrap(Calls(function).eval(), RECIPE, verify=False, train=False)
    assert STEPS() == 1  # of the one call that was traced
    assert capsys.readouterr().out == "called\n"


@torch.no_grad()
def test_10_what_forward_deletes_is_deleted() -> None:
    host: Any = Deletes().eval()
    host.once = 1
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False)
    assert host.once == 1
    model(IMAGES)
    assert not hasattr(host, "once")


@torch.no_grad()
def test_10_a_program_adds_to_what_the_host_would_add_to() -> None:
    torch.manual_seed(0)
    host, plain = TakesNotes().eval(), TakesNotes().eval()
    plain.load_state_dict(host.state_dict())
    held = [host.log, host.sizes, host.recent, host.stats]
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()
    assert held == [[], set(), deque(), {"owner": 1}]
    assert host.notes.calls == 0
    host.stats["owner"] = plain.stats["owner"] = 2
    for batch in (1, 2, 2):
        model(IMAGES[:batch])
        plain(IMAGES[:batch])
    now = [host.log, host.sizes, host.recent, host.stats]
    assert all(a is b for a, b in zip(held, now, strict=True))
    torch.testing.assert_close(host.stats.pop("mean"), plain.stats.pop("mean"))
    assert now == [plain.log, plain.sizes, plain.recent, plain.stats]
    assert host.notes.calls == plain.notes.calls == 3
    assert tokenprune.cache_info(model).traced == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_10_a_program_leaves_what_the_host_would_leave(kind: type[Host]) -> None:
    torch.manual_seed(0)
    host, plain = kind().eval(), kind().eval()
    plain.load_state_dict(host.state_dict())
    plain(IMAGES)
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()
    model(IMAGES)
    with torch.no_grad(), model.using("gather", keep_indices=EVERY):
        for _ in range(3):
            torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    assert torch.equal(host.calls, plain.calls)
    assert getattr(host, "steps", None) == getattr(plain, "steps", None)
    assert (host.last is None) == (plain.last is None)
    if host.last is not None:
        torch.testing.assert_close(host.last, plain.last)
    assert tokenprune.cache_info(model).traced == 1
    assert not any(fake(value) for module in host.modules() for value in vars(module).values())


@pytest.mark.parametrize("kind", [Alternates, NotesAll])
def test_10_a_host_that_reads_what_it_changes_in_every_call_is_refused(kind: type[Host]) -> None:
    model = tokenprune.wrap(kind().eval(), RECIPE, verify=False, train=False)
    for _ in range(5):
        model(IMAGES)
    name = "steps" if kind is Alternates else "stats"
    with pytest.raises(HostError, match=rf"changes '{name}' of its {kind.__name__} in every call"):
        model(IMAGES)
