"""`trace`: module calls, markers, what cannot be traced, and that the host is left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenprune
from tests.tracing.function_host import WIDTH, Host, record, snapshot
from tokenprune.analysis.blocks import Blocks as Found
from tokenprune.analysis.blocks import find_blocks, site_marker
from tokenprune.errors import HostError, TraceError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.host_graph import HostGraph, trace


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


def traced(host: nn.Module, x: Tensor) -> tuple[HostGraph, Found]:
    graph = trace(host, {"x": x})
    spec = ArchSpec(adapter="by hand", blocks=("first", "second"), num_prefix_tokens=0)
    return graph, find_blocks(host, graph, spec)


def test_blocks_are_marked_whether_tokens_come_by_position_or_by_name() -> None:
    host = Blocks(lambda host, x: host.second(2.0, tokens=host.first(x)))
    graph, blocks = traced(host, torch.randn(2, 5, WIDTH))
    assert [block.entry.args[1] for block in blocks.values()] == [0, 1]
    assert all(block.entry.target is site_marker for block in blocks.values())
    assert graph.batch_size == 2
    assert sorted(graph.calls) == ["first", "second"]
    ((second,),) = (graph.calls["second"],)
    assert [node.op for node in second.nodes()] == ["call_function"]
    assert graph.output_of("first").target == "first"
    assert graph.output_of("nobody") is None


def test_a_block_that_gets_no_tensor_is_named() -> None:
    host = Blocks(lambda host, x: host.first(x))
    spec = ArchSpec(adapter="by hand", blocks=("first", "second"), num_prefix_tokens=0)
    recipe = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.5}}
    with pytest.raises(TraceError, match=r"Blocks \[1\] \(second\) take no tensor in the forward"):
        tokenprune.wrap(host, recipe, adapter=spec, example_inputs=torch.randn(2, 5, WIDTH))


def values_asked(host: Blocks, x: Tensor) -> Tensor:
    return host.first(x) if x.sum() > 0 else x


def item_asked(host: Blocks, x: Tensor) -> Tensor:
    return host.first(x) * x.amax().item()


def own_tensor(host: Blocks, x: Tensor) -> Tensor:
    return host.first(x) + next(NOBODYS)


def refuses(host: Blocks, x: Tensor) -> Tensor:
    raise ValueError(f"I take 7 tokens, not {x.shape[1]}.")


def asserts(host: Blocks, x: Tensor) -> Tensor:
    x = host.first(x)
    assert x.shape[1] == 7, "wrong length"
    return x


NOBODYS = iter([torch.ones(WIDTH)] * 9)


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (
            values_asked,
            TraceError,
            r"if x\.sum\(\) > 0.* Python asks for a value of a tensor",
        ),
        (item_asked, TraceError, r"amax\(\)\.item\(\).* Python asks for a value of a tensor"),
        (own_tensor, TraceError, r"NOBODYS\)\).*no module, global or closure of the host holds.*"),
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
        traced(host, torch.randn(2, 5, WIDTH))
    assert snapshot(host) == before
