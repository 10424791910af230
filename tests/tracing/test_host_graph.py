"""Tracing: what proxies answer, and what the graph holds."""

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tests.tracing.function_host import WIDTH, Host, record, replay
from tokenprune.errors import TraceError
from tokenprune.tracing.host_graph import trace
from tokenprune.tracing.interpret import run


def same(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(tree_leaves(ours), tree_leaves(theirs), strict=True))
    return bool(pairs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs
    )


def loop(host: Host, x: Tensor) -> Tensor:
    for i in range(x.shape[1]):
        x = x + i
    return x


def assign(host: Host, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    x[:, 1:3] += 1
    x *= 2
    x -= 1
    x /= 3
    return x


def decide(host: Host, x: Tensor) -> Tensor:
    if x.shape[1:] == (5, WIDTH) or x.size(1) != 5:
        return x * 2
    return x


def unpack(host: Host, x: Tensor) -> Tensor:
    b, n, d = x.shape
    first, *others = x.unbind(1)
    return x.reshape(b, n // 5, *x.shape[1:]).sum(1) + first.view(b, 1, d) + len(others)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": lambda host, x: x * len(x[0]),
    "star_shape": lambda host, x: x.reshape(*x.shape[:1], -1),
    "unpack": unpack,
    "tuple_and_shape": lambda host, x: x.view((x.shape[0],) + x.shape[1:2] + (2, 3)),  # noqa: RUF005
    "shape_and_tuple": lambda host, x: x.view(x.shape[:-1] + (2, 3)),  # noqa: RUF005
    "power": lambda host, x: x[:, : int((x.shape[1] - 1) ** 0.5)],
    "math": lambda host, x: x * math.sqrt(x.shape[1]) + math.ceil(x.size(1) / 2),
    "round": lambda host, x: x * round(x.shape[1] / 2) + round(x.shape[1] / 3, 1),
    "reversed_operators": lambda host, x: (2 - x) / (1 + 3 / (1.5 + x.abs())) + 2 ** x.shape[1],
    "comparison": decide,
    "loop": loop,
    "contains": lambda host, x: x * 2 if 5 in x.shape else x,
    "min": lambda host, x: x[:, : min(x.shape[1], 3)],
    "none": lambda host, x: x if x is None or x.dtype != torch.float32 else x + 1,
    "isinstance": lambda host, x: x + 1 if isinstance(x, Tensor) else x,
    "format": lambda host, x: x * len(f"{x.shape[1]:>4}"),
    "rank": lambda host, x: x.transpose(x.ndim - 1, x.dim() - 2),
    "attributes": lambda host, x: x.mT.to(x.device, x.dtype).contiguous(),
    "assign": assign,
    "arange": lambda host, x: x + torch.arange(x.shape[1], device=x.device)[:, None],
    "new_zeros": lambda host, x: torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1),
    "zeros": lambda host, x: x + torch.zeros(x.shape) + torch.ones_like(x) + torch.full((1,), 2.0),
    "max": lambda host, x: x.max(dim=1).values + torch.max(x, 1)[0],
    "split": lambda host, x: torch.cat(x.split([2, x.shape[2] - 2], dim=-1)[::-1], -1),
    "chunk": lambda host, x: x.chunk(2, -1)[0] @ x.chunk(2, -1)[1].mT,
    "parameter": lambda host, x: x * host.weight + host.weight.sum(),
    "buffer": lambda host, x: x + host.table[: x.shape[1]],
    "plain_attribute": lambda host, x: x + host.plain * 2,
    "parameter_list": lambda host, x: x + host.several[1] - host.several[0],
    "module": lambda host, x: host.inner["deep"](host.linear(x)),
    "functional": lambda host, x: F.linear(x, host.linear.weight, bias=host.linear.bias),
    "made_in_forward": lambda host, x: nn.Softmax(dim=-1)(x),
    "cache": lambda host, x: x + host.cache.setdefault(5, torch.ones(WIDTH)),
    "two_in_place": lambda host, x: (lambda z: z.add_(1).mul_(z))(x.clone()),
    "where": lambda host, x: torch.where(x > 0, x, x.masked_fill(x < -1, 0.0)),
    "interpolate": lambda host, x: F.interpolate(x, size=x.shape[-1] * 2, mode="linear"),
    "shape_of_two": lambda host, x: x.expand_as(x) if x.shape == (x * 2).shape else x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_what_the_host_does_for_any_batch_size(name: str) -> None:
    host = Host(FUNCTIONS[name])
    _, graph = record(host, x=torch.randn(2, 5, WIDTH))
    for batch in (2, 3, 1):
        x = torch.randn(batch, 5, WIDTH)
        output = replay(host, graph, {"x": x})
        host.cache.clear()
        assert same(output, host(x))


def test_python_branches_and_specialized_sizes_are_noted() -> None:
    for name in ("loop", "power", "math", "comparison", "format"):
        tracer, _ = record(Host(FUNCTIONS[name]), x=torch.randn(2, 5, WIDTH))
        assert tracer.specialized or name == "format", name
    for name in ("unpack", "arange", "buffer", "new_zeros", "attributes", "module"):
        tracer, _ = record(Host(FUNCTIONS[name]), x=torch.randn(2, 5, WIDTH))
        assert not tracer.specialized, name


def test_an_array_of_sizes_is_one_of_numbers() -> None:
    def divisible(host: Host, x: Tensor) -> Tensor:
        assert not (np.array(x.shape[1:]) % np.array([1, 1])).any()
        return x * float(np.array(x.shape).sum())

    host, inputs = Host(divisible), {"x": torch.ones(2, 3, 4)}
    _, graph = record(host, **inputs)
    assert torch.equal(replay(host, graph, inputs), torch.full((2, 3, 4), 9.0))


def test_sizes_stay_symbolic() -> None:
    host = Host(FUNCTIONS["arange"])
    _, graph = record(host, x=torch.randn(2, 5, WIDTH))
    x = torch.randn(4, 9, WIDTH)
    assert same(replay(host, graph, {"x": x}), host(x))


def test_names_of_what_a_module_holds_are_on_the_nodes() -> None:
    def use(host: Host, x: Tensor) -> Tensor:
        return host.linear(x * host.weight + host.table + host.plain + host.several[1])

    _, graph = record(Host(use), x=torch.randn(2, 5, WIDTH))
    held = [str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module")]
    assert sorted(held) == ["linear", "plain", "several.1", "table", "weight"]


@dataclass
class Optional:
    logits: Tensor
    loss: Tensor | None = None


@dataclass
class Needy:
    loss: Tensor | None
    logits: Tensor
    made: str = field(default="made", init=False)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


class Plain(dict):  # type: ignore[type-arg]
    pass


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, (x + 1, None)),
    "list": lambda x: [x, [x + 1]],
    "dict": lambda x: {"logits": x, "more": {"even": x + 1}, "number": 3},
    "ordered_dict": lambda x: OrderedDict(logits=x, more=x + 1),
    "dict_subclass": lambda x: Plain(logits=x),
    "dataclass": Optional,
    "dataclass_that_needs_its_none": lambda x: Needy(None, x),
    "named_tuple": lambda x: Pair(x, None),
    "nested": lambda x: (x, [Optional(x, x + 1), Pair(x, x)], {"needy": Needy(x, x)}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_outputs_keep_their_type(name: str) -> None:
    host = Host(lambda host, x: CONTAINERS[name](x * 2))
    x = torch.randn(2, 5, WIDTH)
    _, graph = record(host, x=x)
    ours, theirs = fx.GraphModule(host, graph)(x), host(x)
    assert type(ours) is type(theirs)
    assert _unpacked(ours) == _unpacked(theirs)


def _unpacked(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Optional | Needy):
        return type(value), {k: _unpacked(v) for k, v in vars(value).items()}
    if isinstance(value, dict):
        return type(value), {k: _unpacked(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value), [_unpacked(v) for v in value]
    return value


def test_each_node_knows_its_module_and_source_line() -> None:
    def both(host: Host, x: Tensor) -> Tensor:
        x = host.inner["deep"](x)
        return x.tanh()  # this line

    _, graph = record(Host(both), x=torch.randn(2, 5, WIDTH))
    where = {str(n.target): n.meta["where"] for n in graph.nodes}
    assert where["inner.deep.0"].module == "inner.deep.0"
    assert "host.inner" in str(where["inner.deep.0"])
    line = r"the host's own forward \(.*test_host_graph\.py:\d+: return x\.tanh\(\)  # this line\)"
    assert re.fullmatch(line, str(where["tanh"]))


def test_torchs_attention_is_opened_and_computes_the_same() -> None:
    class Attends(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, 2, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    for options in (
        *({"batch_first": True}, {}, {"bias": False}, {"kdim": WIDTH, "vdim": WIDTH}),
        {"add_bias_kv": True},
    ):
        host = Attends(**options)
        x = torch.randn(2, 5, WIDTH)
        _, graph = record(host, x=x)
        assert F.scaled_dot_product_attention in {n.target for n in graph.nodes}
        torch.testing.assert_close(replay(host, graph, {"x": x}), host(x))


def test_values_are_let_go_after_their_last_use() -> None:
    host = Host(lambda host, x: ((x + 1) * 2).sum())
    _, graph = record(host, x=torch.randn(2, 5, WIDTH))
    alive: list[int] = []

    def step(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        alive.append(len(env))
        return torch.zeros(())

    list(run(host, graph, {"x": torch.zeros(1)}, step))
    assert alive == [1, 1, 1]


def test_other_threads_run_torch_as_it_is_while_a_host_is_traced() -> None:
    """A trace patches torch; another thread computes and differentiates meanwhile."""
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert done.wait(20)
            return x + torch.arange(4)

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    host = Waits()
    graphs: list[fx.Graph] = []

    def record_graph() -> None:
        graphs.append(trace(host, {"x": torch.ones(2, 4)}).graph)

    thread = threading.Thread(target=record_graph)
    thread.start()
    try:
        assert inside.wait(20)
        layer, leaf = nn.Linear(4, 4), torch.arange(4.0, requires_grad=True)
        output = Squared.apply(layer(leaf.expand(2, -1)))
        output.sum().backward()
    finally:
        done.set()
        thread.join()
    assert type(output) is Tensor
    assert leaf.grad is not None
    (graph,) = graphs
    assert [n.op for n in graph.nodes if n.op != "call_function"] == ["placeholder", "output"]
    assert len(graph.nodes) == 4  # arange and the sum


def test_a_tensor_takes_no_arguments() -> None:
    def branches(_: Host, x: Tensor) -> Tensor:
        return x(1) if callable(x) else x  # no tensor is callable, each proxy is

    with pytest.raises(TraceError, match=r"callable\(x\) else x.*TypeError"):
        trace(Host(branches), {"x": torch.ones(2, 5, WIDTH)})
