"""Random numbers that Python reads: never frozen, told with the line that draws."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tracing.function_host import WIDTH, Host, record, replay
from tokenprune.errors import TraceError
from tokenprune.tracing.host_graph import trace

X = torch.randn(2, 5, WIDTH)
RNG, OWN, OLD = np.random.default_rng(0), random.Random(0), np.random.RandomState(0)


def helper(p: float) -> bool:
    return random.random() < p


def closure() -> Callable[..., Any]:
    hidden = {"deep": [np.random.default_rng(1)]}
    return lambda host, x: x * hidden["deep"][0].random()


def seeds(host: Host, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return x + torch.rand(())


def in_two_lines(host: Host, x: Tensor) -> Tensor:
    x = x + 1
    order = np.random.permutation(int(x.shape[1]))
    return x[:, order.tolist()]


DRAWS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "python": (
        lambda host, x: x if random.random() < 0.5 else x + 1,
        "Python's random",
        "random()",
    ),
    "helper": (lambda host, x: x if helper(0.5) else x + 1, "Python's random", "random() < p"),
    "shuffle": (lambda host, x: x[:, random.sample(range(5), 5)], "Python's random", "sample"),
    "instance": (lambda host, x: x * OWN.uniform(0, 1), "Python's random", "OWN"),
    "numpy": (lambda host, x: x if np.random.uniform() < 0.5 else -x, "NumPy's", "uniform"),
    "numpy_generator": (lambda host, x: x * RNG.random(), "NumPy's", "RNG"),
    "random_state": (lambda host, x: x * float(OLD.rand()), "NumPy's", "OLD"),
    "attribute": (lambda host, x: x * host.maps[0].random(), "NumPy's", "maps"),
    "closure": (closure(), "NumPy's", "hidden"),
    "lines": (in_two_lines, "NumPy's", "permutation"),
    "unseeded": (lambda host, x: x * np.random.default_rng().random(), "numpy.random", "default"),
    "unseeded_python": (lambda host, x: x * random.Random().random(), "random.Random", "Random()"),
    "system": (lambda host, x: x * random.SystemRandom().random(), "random.System", "System"),
    "unseeded_state": (lambda host, x: x * np.random.RandomState().rand(), "numpy.random", "State"),
    "seed": (seeds, "torch's generator, or seeds it", "manual_seed"),
}


def states() -> list[Any]:
    found = [random.getstate(), repr(np.random.get_state()), repr(RNG.bit_generator.state)]
    return [*found, OWN.getstate(), repr(OLD.get_state()), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", DRAWS)
def test_it_is_refused_with_the_line_and_the_generator_is_put_back(name: str) -> None:
    function, generator, line = DRAWS[name]
    host = Host(function)
    host.maps.append(np.random.default_rng(3))
    before = states()
    with pytest.raises(TraceError, match=f"draws from {generator}.*Set the") as caught:
        trace(host, {"x": X})
    assert states() == before
    said = str(caught.value)
    assert "test_randomness.py:" in said
    assert any(part in said for part in line.split("|"))


def test_a_seed_makes_a_constant() -> None:
    def masks(host: Host, x: Tensor) -> Tensor:
        made = [np.random.default_rng(3), random.Random(4), np.random.RandomState(5)]
        assert isinstance(made[1], random.Random)
        assert isinstance(made[2], np.random.RandomState)
        return x * sum(float(one.random()) for one in made)

    host = Host(masks)
    assert torch.equal(replay(host, trace(host, {"x": X}).graph, {"x": X}), host(X))


def test_a_failing_trace_puts_generators_back() -> None:
    def fails(host: Host, x: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        raise RuntimeError("in the middle")

    host, before = Host(fails), states()
    with pytest.raises(TraceError, match="in the middle"):
        trace(host, {"x": X})
    assert states() == before


class Layers(nn.Module):
    """LayerDrop as transformers write it."""

    def __init__(self, p: float, compare: Callable[[Any, float], Any]) -> None:
        super().__init__()
        self.p, self.compare = p, compare
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            skip = self.training and self.compare(torch.rand([]), self.p)
            if not skip:
                x = layer(x)
        return {"out": x}


COMPARISONS: dict[str, Callable[[Any, float], Any]] = {
    "tensor": lambda r, p: r < p,
    "at_most": lambda r, p: r <= (p or -1),
    "more": lambda r, p: not r >= p,
    "number_first": lambda r, p: p > r,
    "item": lambda r, p: r.item() < p,
    "item_of_it": lambda r, p: (r < p).item(),
    "function": lambda r, p: torch.lt(r, p),
    "method": lambda r, p: r.lt(p),
    "uniform": lambda r, p: torch.empty(1).uniform_(0, 1) < p,
    "uniform_item": lambda r, p: torch.zeros(1).uniform_().item() < p,
    "uniform_wide": lambda r, p: torch.zeros(1).uniform_(-1, 1)[0] < p * 3 - 1.5,
    "one_of": lambda r, p: torch.rand(1)[0] < p,
    "negated": lambda r, p: not r > (p or -1),
    "like": lambda r, p: torch.rand_like(r).to(torch.float64) < p,
    "whole": lambda r, p: torch.randint(0, 4, ()).item() < p * 4,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_a_comparison_whose_outcome_is_certain_is_decided(name: str, p: float) -> None:
    host = Layers(p, COMPARISONS[name]).train()
    state = torch.get_rng_state()
    graph = trace(host, {"x": X}).graph
    assert torch.equal(torch.get_rng_state(), state)
    called = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    assert called == ([] if p else ["layers.0", "layers.1"])
    assert not any("rand" in str(node.target) for node in graph.nodes)


SAID = r"test_randomness.*random number that torch draws.*to 0 in this mode"
ASKED = {
    **COMPARISONS,
    "float": lambda r, p: float(r) < p,
    "int": lambda r, p: int(r * 10) < p,
    "index": lambda r, p: [True, False][torch.randint(2, ()).item()],
    "round": lambda r, p: round(r.item()) == 0,
    "bernoulli": lambda r, p: torch.bernoulli(torch.full((), p)),
    "equal": lambda r, p: r.item() == p,
    "where": lambda r, p: torch.rand(4).gt(p).nonzero().numel() > 2,
}


@pytest.mark.parametrize("name", ASKED)
def test_any_other_is_refused_by_name(name: str) -> None:
    host = Layers(0.5, ASKED[name]).train()
    with pytest.raises(TraceError, match=SAID):
        trace(host, {"x": X})
    trace(host.eval(), {"x": X})


def test_a_number_that_is_drawn_may_be_used_as_a_number() -> None:
    host = Host(lambda host, x: x * torch.rand(()).item())
    _, graph = record(host, x=X)
    torch.manual_seed(3)
    wanted = host(X)
    torch.manual_seed(3)
    assert torch.equal(replay(host, graph, {"x": X}), wanted)


def test_a_generator_of_torch_that_the_host_holds_is_used() -> None:
    host = Host(lambda host, x: x + torch.rand(x.shape, generator=host.noise))
    host.noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    _, graph = record(host, x=x)
    wanted = [host(x), host(x)]
    host.noise.manual_seed(0)
    assert [torch.equal(replay(host, graph, {"x": x}), out) for out in wanted] == [True, True]


def test_sizes_of_a_draw_are_not_drawn() -> None:
    host = Host(lambda host, x: x[:, : torch.rand(3).shape[0]] if torch.rand(2).numel() == 2 else x)
    _, graph = record(host, x=X)
    assert replay(host, graph, {"x": X}).shape == (2, 3, WIDTH)
