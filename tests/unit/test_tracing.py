"""Tracing: what proxies answer, what the graph holds, and that the host is left as it was."""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenprune.errors import HostError, TraceError
from tokenprune.tracing.interpret import run
from tokenprune.tracing.traced import Traced, trace_call
from tokenprune.tracing.tracer import ValueTracer, enter_block

WIDTH = 6


class Host(nn.Module):
    """A function of one tensor as a host, with things to hold on to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("table", torch.randn(5, WIDTH))
        self.plain = torch.randn(1, WIDTH)
        self.several = nn.ParameterList([torch.randn(WIDTH) for _ in range(2)])
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())})
        self.remembered: Any = None
        self.cache: dict[Any, Any] = {}
        self.maps: list[Any] = []

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(self, x) if y is None else self.function(self, x, y)


def record(host: nn.Module, **inputs: Any) -> tuple[ValueTracer, fx.Graph]:
    tracer = ValueTracer(host, blocks=())
    return tracer, tracer.record(host.forward, inputs)


def replay(host: nn.Module, graph: fx.Graph, inputs: Mapping[str, Tensor]) -> Any:
    """The output of a graph, run for real."""
    *_, (_, output) = run(host, graph, inputs)
    return output


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


def test_decisions_and_burnt_sizes_are_noted_and_nothing_else_is() -> None:
    for name in ("loop", "power", "math", "comparison", "format"):
        tracer, _ = record(Host(FUNCTIONS[name]), x=torch.randn(2, 5, WIDTH))
        assert tracer.burnt or name == "format", name
    for name in ("unpack", "arange", "buffer", "new_zeros", "attributes", "module"):
        tracer, _ = record(Host(FUNCTIONS[name]), x=torch.randn(2, 5, WIDTH))
        assert not tracer.burnt, name


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
    line = r"the host's own forward \(.*test_tracing\.py:\d+: return x\.tanh\(\)  # this line\)"
    assert re.fullmatch(line, str(where["tanh"]))


def test_torchs_attention_is_opened_and_computes_the_same() -> None:
    class Attends(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(WIDTH, 2, **options)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    for options in ({"batch_first": True}, {}, {"bias": False}, {"kdim": WIDTH, "vdim": WIDTH}):
        host = Attends(**options)
        x = torch.randn(2, 5, WIDTH)
        _, graph = record(host, x=x)
        assert F.scaled_dot_product_attention in {n.target for n in graph.nodes}
        torch.testing.assert_close(replay(host, graph, {"x": x}), host(x))

    host = Attends(add_bias_kv=True)
    with pytest.raises(TraceError, match=r"module 'inner'.*bias_k"):
        trace(host, x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_host_and_torch_are_left_as_they_were(fails: bool) -> None:
    def untidy(host: Host, x: Tensor) -> Tensor:
        host.remembered = host.linear.remembered = x
        host.cache[x.shape[1]] = x
        host.maps.append(x)
        host.table = x
        host.register_forward_hook(lambda *_: None)
        if fails:
            raise RuntimeError("in the middle")
        return host.linear(x)

    host = Host(untidy)
    host.inner.eval()
    before, modes = snapshot(host), [m.training for m in host.modules()]
    patched = [torch.arange, torch.zeros, torch.tensor, nn.Module.__call__, nn.Module.__getattr__]
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            record(host, x=torch.randn(2, 5, WIDTH))
    else:
        record(host, x=torch.zeros(2, 5, WIDTH))
        assert torch.equal(torch.get_rng_state(), state)
    now = [torch.arange, torch.zeros, torch.tensor, nn.Module.__call__, nn.Module.__getattr__]
    assert all(a is b for a, b in zip(patched, now, strict=True))
    assert snapshot(host) == before
    assert [m.training for m in host.modules()] == modes
    assert torch.is_grad_enabled()
    assert not host._forward_hooks


def snapshot(host: nn.Module) -> list[Any]:
    """What every module holds, by identity; containers by what they hold."""
    held = []
    for path, module in host.named_modules():
        for name, value in vars(module).items():
            pairs = enumerate(value) if isinstance(value, list) else ()
            inside = value.items() if isinstance(value, dict) else pairs
            held.append((path, name, id(value), [(k, id(v)) for k, v in inside]))
    return held


class _RealBytes(TorchDispatchMode):
    """Counts the bytes of real tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if type(leaf) is Tensor and leaf.device.type != "meta":
                self.bytes += leaf.nbytes
        return out


def test_tracing_makes_no_real_tensor() -> None:
    host = Host(lambda host, x: host.linear(x @ x.mT @ x + torch.zeros(1000, 1, WIDTH)))
    x = torch.randn(1000, 5, WIDTH)
    with _RealBytes() as count:
        host(x)
    assert count.bytes > x.nbytes  # the counter counts
    with _RealBytes() as count:
        record(host, x=x)
    assert count.bytes == 0


# --- trace_call ---


class Blocks(nn.Module):
    """Two blocks, and one that is called as asked for."""

    def __init__(self, call: Callable[["Blocks", Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.first, self.second = nn.Linear(WIDTH, WIDTH), Keyword()

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


class Keyword(nn.Module):
    def forward(self, scale: float = 1.0, *, tokens: Tensor) -> Tensor:
        return tokens * scale


def trace(host: nn.Module, x: Tensor, stages: tuple[int, ...] = (0,)) -> Traced:
    blocks = ("first", "second") if isinstance(host, Blocks) else ()
    return trace_call(host, host.forward, {"x": x}, blocks, stages if blocks else ())


def test_blocks_are_marked_whether_tokens_come_by_position_or_by_name() -> None:
    host = Blocks(lambda host, x: host.second(2.0, tokens=host.first(x)))
    traced = trace(host, torch.randn(2, 5, WIDTH), (0, 1))
    assert [traced.markers[s].args[1] for s in (0, 1)] == [0, 1]
    assert all(node.target is enter_block for node in traced.markers.values())
    assert traced.batch_size == 2
    assert traced.module_outputs["first"].target == "first"
    assert sorted(traced.modes) == ["", "second"]


def test_a_block_that_gets_no_tensor_is_named() -> None:
    host = Blocks(lambda host, x: host.first(x))
    with pytest.raises(TraceError, match=r"Blocks \[1\] \(second\) take no tensor in the forward"):
        trace(host, torch.randn(2, 5, WIDTH), (0, 1))


def values_asked(host: Blocks, x: Tensor) -> Tensor:
    return host.first(x) if x.sum() > 0 else x


def item_asked(host: Blocks, x: Tensor) -> Tensor:
    return host.first(x) * x.amax().item()


def own_tensor(host: Blocks, x: Tensor) -> Tensor:
    return host.first(x) + NOBODYS


def refuses(host: Blocks, x: Tensor) -> Tensor:
    raise ValueError(f"I take 7 tokens, not {x.shape[1]}.")


def asserts(host: Blocks, x: Tensor) -> Tensor:
    x = host.first(x)
    assert x.shape[1] == 7, "wrong length"
    return x


NOBODYS = torch.ones(WIDTH)


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (
            values_asked,
            TraceError,
            r"if x\.sum\(\) > 0.* Python asks for a value of a tensor",
        ),
        (item_asked, TraceError, r"amax\(\)\.item\(\).* Python asks for a value of a tensor"),
        (own_tensor, TraceError, r"NOBODYS\).*no parameter, buffer or attribute of any module\.$"),
        (
            refuses,
            HostError,
            r"Blocks refused the input \{'x': \(2, 5, 6\)\} at the host's own",
        ),
        (
            refuses,
            HostError,
            r"It said: ValueError: I take 7 tokens, not 5\. Give it an input",
        ),
        (asserts, HostError, r"AssertionError: wrong length"),
        (lambda host, x: host.first(x[..., :2]), TraceError, r"stopped at module 'first' \("),
        (lambda host, x: host.first(x) @ x, TraceError, r"stopped at the host's own forward \("),
    ],
)
def test_what_cannot_be_traced_is_told_with_its_line(
    function: Callable[..., Any], error: type[Exception], says: str
) -> None:
    host = Blocks(function)
    before = snapshot(host)
    with pytest.raises(error, match=says):
        trace(host, torch.randn(2, 5, WIDTH))
    assert snapshot(host) == before


def test_values_are_let_go_after_their_last_use() -> None:
    host = Host(lambda host, x: ((x + 1) * 2).sum())
    _, graph = record(host, x=torch.randn(2, 5, WIDTH))
    alive: list[int] = []

    def step(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        alive.append(len(env))
        return torch.zeros(())

    list(run(host, graph, {"x": torch.zeros(1)}, step))
    assert alive == [1, 1, 1]
