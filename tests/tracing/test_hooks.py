"""Which hooks are the host's own code, and that none of the others runs while it is traced."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.tracing.function_host import WIDTH, Host
from tokenprune.tracing.hook_nodes import After, Before, is_hook_node, passed
from tokenprune.tracing.hooks import Hooks
from tokenprune.tracing.host_graph import trace
from tokenprune.tracing.interpret import evaluate, run
from tokenprune.tracing.structure import Structure


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("a hook ran")


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(fail, with_kwargs=True)
    module.register_forward_pre_hook(fail, with_kwargs=True)


def test_no_hook_runs_while_a_host_is_traced() -> None:
    host = Host(lambda host, x: host.inner["deep"](host.linear(x)))
    for module in host.modules():
        if module is not host:
            hooked(module)
    traced = trace(host, {"x": torch.zeros(2, 5, WIDTH)})
    kinds = [type(node.target) for node in traced.graph.nodes if is_hook_node(node)]
    assert kinds[0] is Before
    assert kinds[-1] is After
    assert kinds.count(Before) == kinds.count(After)
    with traced.fake_mode:  # the probes do the same
        inputs = {name: node.meta["val"] for name, node in traced.inputs.items()}
        for _ in run(host, traced.graph, inputs):
            pass


def test_a_hooked_module_that_nobody_reads_stays_in_the_graph() -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        host.inner["deep"](x)
        return host.linear(x)

    host = Host(forward)
    host.inner["deep"].register_forward_hook(lambda *_: None)
    graph = trace(host, {"x": torch.zeros(2, 5, WIDTH)}).graph
    read = {used for node in graph.nodes if is_hook_node(node) for used in node.all_input_nodes}
    assert any(node.target is passed or node.op == "call_module" for node in read)


class Explainer:
    """Somebody else's."""

    def keep(self, *_: Any) -> None:
        pass

    def other(self) -> Any:
        return lambda *_: None


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.helper = nn.Linear(2, 2), Explainer()

    def keep(self, *_: Any) -> None:
        pass

    def inner(self) -> Any:
        return lambda *_: None


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda host: host.keep, True),
        (lambda host: host.inner(), True),
        (lambda host: host.helper.keep, True),
        (lambda host: partial(host.helper.keep, 1), True),
        (lambda host: Explainer().keep, False),
        (lambda host: Explainer().other(), False),
        (lambda host: lambda *_: None, False),
        (lambda host: Own().keep, False),
    ],
    ids=["method", "closure", "held", "partial", "other", "closure_of_other", "lambda", "twin"],
)
def test_which_hooks_are_the_hosts(make: Any, own: bool) -> None:
    host = Own()
    hook = make(host)
    handle = host.linear.register_forward_hook(hook)
    assert Hooks(host).of_host(handle.id, hook) is own


def test_states() -> None:
    host = nn.Module()
    host.first, host.second = nn.Sequential(nn.Linear(2, 2)), nn.Sequential()
    hooks = Hooks(host)

    def states() -> tuple[int, ...]:
        return hooks.state(host.first), hooks.state(host.second)

    assert states() == (0, 0)
    with host.first[0].register_forward_hook(fail):  # it runs with its module
        assert states() == (0, 0)
    with host.first.register_forward_pre_hook(fail):
        assert states() == (1, 0)
        with host.second.register_full_backward_hook(fail):
            assert states() == (1, 2)
    with torch.nn.modules.module.register_module_forward_hook(fail):
        assert states() == (1, 1)


def test_a_tensor_given_several_times_stays_one() -> None:
    host = Host(lambda host, x: host.same(x, x))
    host.same = _Same()
    host.same.register_forward_pre_hook(lambda *_: None)
    assert trace(host, {"x": torch.zeros(2, 5, WIDTH)}).graph


class _Same(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x is y
        return x + y


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Held:
    value: Any
    name: str = "held"


def test_a_structure_is_built_again() -> None:
    value = (Pair(1, [2, {"a": Held(3)}]), None)
    structure, leaves = Structure.of(value, lambda entry: isinstance(entry, Held))
    assert leaves == [1, 2, 3, "held", *([None] if len(leaves) == 5 else [])]
    assert structure.build(leaves) == value
    assert structure.leaves_of((Pair(1, [2, {"a": Held(9)}]), None))[2] == 9
    assert structure.leaves_of((Pair(1, [2, {"b": Held(3)}]), None)) is None
    assert structure.leaves_of((Pair(1, [2, {"a": 3}]), None)) is None


def test_weights_that_are_elsewhere_are_traced_as_if_they_were_there() -> None:
    host = Host(lambda host, x: host.linear(x) + host.away)
    host.linear.to("meta")
    host.away = nn.Parameter(torch.empty(WIDTH, device="meta"))
    traced = trace(host, {"x": torch.zeros(2, 5, WIDTH)})
    last = traced.graph.output_node().all_input_nodes[0]
    assert last.meta["val"].device.type == "cpu"
    with traced.fake_mode:
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                assert evaluate(host, node, {}).device.type == "cpu"
