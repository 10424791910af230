"""Tensors that are no parameters and no buffers: attributes, lists, objects, globals, closures."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracing import constants_elsewhere as elsewhere
from tests.tracing.function_host import WIDTH, Host, record, replay
from tokenprune.errors import TraceError
from tokenprune.tracing.host_graph import trace

TABLE = torch.randn(1, WIDTH)
HELD = {"tables": [torch.randn(1, WIDTH), torch.randn(5, WIDTH)]}


class Rope:
    def __init__(self) -> None:
        self.cos = torch.randn(5, WIDTH)

    def take(self, n: Any) -> Tensor:
        return self.cos[:n]


class Holder(Host):
    shared = torch.randn(1, WIDTH)
    every = (torch.randn(1, WIDTH), torch.randn(1, WIDTH))

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.rope, self.several_plain = Rope(), [torch.randn(1, WIDTH), torch.randn(WIDTH)]
        self.by_name = {"a": {0: torch.randn(5, WIDTH)}}
        self.loose = [nn.Linear(WIDTH, WIDTH)]


def closure() -> Callable[..., Any]:
    bias, more = torch.randn(WIDTH), [torch.randn(1, WIDTH)]
    return lambda host, x: x + bias + more[0].expand(x.shape[0], -1)[:, None]


def sizes(host: Holder, x: Tensor) -> Tensor:
    b, n, d = x.size(0), x.shape[1], x.shape[-1]
    t = host.several_plain[0]
    made = [t.new_zeros(b, n, d), t.new_ones((b, n, d)), t.new_empty(x.shape).fill_(2.0)]
    made += [t.new_full((b, n, d), 3.0), t.repeat(n, 1).expand(b, -1, -1), t.expand_as(x)]
    made += [t.view(1, 1, d).expand(b, n, d), t.reshape(1, -1, d).repeat(b, n, 1)]
    made += [t.unflatten(1, (1, d)).expand(b, n, -1), t.tile((b, n, 1)), t.broadcast_to((b, n, d))]
    return sum(made, x) * host.by_name["a"][0][:n] + host.by_name["a"][0].narrow(0, 0, n)


def plain_sizes(host: Holder, x: Tensor) -> Tensor:
    b, n, d = x.shape
    t = host.plain
    made = [t.new_zeros(b, n, d), t.new_ones((b, n, d)), t.new_empty(x.shape).fill_(2.0)]
    made += [t.expand(b, n, -1), t.repeat(b, n, 1).view(b, n, d), t.reshape(1, 1, d).expand_as(x)]
    size = torch.Size([b]) + x.shape[1:]
    return sum(made, x) + t.new_full(size, 2.0) + t.new_zeros(torch.Size((b, 1, d)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "global": lambda host, x: x + TABLE.expand(x.shape[0], -1)[:, None],
    "global_container": lambda host, x: x + HELD["tables"][0] * HELD["tables"][1][: x.shape[1]],
    "other_module": lambda host, x: x + elsewhere.TABLE + elsewhere.Tables.bias,
    "function_elsewhere": lambda host, x: elsewhere.shifted(x),
    "list": lambda host, x: x + host.several_plain[1] + host.several_plain[0] * 2,
    "dict": lambda host, x: x * host.by_name["a"][0],
    "object": lambda host, x: x + host.rope.take(x.shape[1]),
    "class_attribute": lambda host, x: x + host.shared + host.every[1],
    "module_in_a_list": lambda host, x: host.loose[0](x),
    "closure": closure,
    "sizes": sizes,
    "plain_sizes": plain_sizes,
    "functional": lambda host, x: torch.nn.functional.pad(host.several_plain[0], (0, x.shape[0])),
    "index": lambda host, x: host.rope.cos[torch.arange(x.shape[1])] + x,
    "only_constants": lambda host, x: x + (TABLE * 2).softmax(-1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_what_the_host_does_for_any_batch_size(name: str) -> None:
    function = FUNCTIONS[name]
    # made here: the collector, which is asked whose a closure is, knows nothing of older ones
    host = Holder(function() if name == "closure" else function)
    tracer, graph = record(host, x=torch.randn(2, 5, WIDTH))
    assert not tracer.specialized
    for batch in (2, 3, 1):
        x = torch.randn(batch, 5, WIDTH)
        assert torch.equal(replay(host, graph, {"x": x}), host(x))


def test_it_is_the_tensor_that_is_there_when_the_graph_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bias = torch.randn(WIDTH)

    def use(host: Holder, x: Tensor) -> Tensor:
        return x + TABLE + host.several_plain[0] + host.rope.cos + host.shared + bias

    host, x = Holder(use), torch.randn(2, 5, WIDTH)
    _, graph = record(host, x=x)
    monkeypatch.setitem(globals(), "TABLE", torch.randn(1, WIDTH))
    monkeypatch.setattr(Holder, "shared", torch.randn(1, WIDTH))
    host.several_plain[0], host.rope.cos = torch.randn(1, WIDTH), torch.randn(5, WIDTH)
    bias = torch.randn(WIDTH)
    assert torch.equal(replay(host, graph, {"x": x}), host(x))
    other = copy.deepcopy(host)
    other.several_plain[0].mul_(2)
    assert torch.equal(replay(other, graph, {"x": x}), other(x))


def test_what_no_later_call_can_find_is_refused() -> None:
    made = iter([torch.ones(WIDTH)])
    host = Host(lambda host, x: x + next(made))
    said = r"a Tensor that no module, global or closure of the host holds.*a buffer"
    with pytest.raises(TraceError, match=said):
        trace(host, {"x": torch.ones(2, WIDTH)})


def test_torch_is_left_as_it_was() -> None:
    before = dict(vars(Tensor)), dict(vars(nn.Module)), torch.Size
    record(Holder(sizes), x=torch.randn(2, 5, WIDTH))
    with pytest.raises(TraceError):
        trace(Host(lambda host, x: x if x.sum() > 0 else -x), {"x": torch.ones(2, WIDTH)})
    assert (dict(vars(Tensor)), dict(vars(nn.Module)), torch.Size) == before


def test_plain_objects_are_not_walked_without_need() -> None:
    class Loud:
        @property
        def table(self) -> Tensor:
            raise AssertionError

    host = Host(lambda host, x: x + host.held.table)
    host.held = SimpleNamespace(table=torch.ones(WIDTH), loud=Loud())
    x = torch.ones(2, WIDTH)
    _, graph = record(host, x=x)
    assert torch.equal(replay(host, graph, {"x": x}), host(x))
