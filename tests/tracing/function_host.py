"""What the tests of tracing share: a host made of one function, and how it is traced."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tokenprune.tracing.arguments import as_arguments
from tokenprune.tracing.interpret import run
from tokenprune.tracing.names import reached_by
from tokenprune.tracing.tracer import ValueTracer

__all__ = ["WIDTH", "Host", "record", "replay", "snapshot"]

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
    tracer = ValueTracer(host)
    return tracer, tracer.record(
        host.forward, as_arguments("Host", inputs), reached_by(host, host.forward)
    )


def replay(host: nn.Module, graph: fx.Graph, inputs: Mapping[str, Tensor]) -> Any:
    """The output of a graph, run for real."""
    *_, (_, output) = run(host, graph, inputs)
    return output


def snapshot(host: nn.Module) -> list[Any]:
    """What every module holds, by identity; containers by what they hold."""
    held = []
    for path, module in host.named_modules():
        for name, value in vars(module).items():
            pairs = enumerate(value) if isinstance(value, list) else ()
            inside = value.items() if isinstance(value, dict) else pairs
            held.append((path, name, id(value), [(k, id(v)) for k, v in inside]))
    return held
