"""Modes of torch that a host sets or reads: what the graph holds of them, what Python is told."""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import is_autocast_enabled as autocast_is_on
from torch import is_grad_enabled as grad_is_on
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tests.tracing.function_host import WIDTH, Host, replay
from tokenprune.tracing.checkpoints import CHECKPOINT
from tokenprune.tracing.host_graph import HostGraph, trace
from tokenprune.tracing.modes import MODES, ambient_holds, state

X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))


def traced(function: Callable[[Host, Tensor], Any], x: Tensor = X) -> tuple[Host, HostGraph]:
    host = Host(function)
    return host, trace(host, {"x": x})


def sources(graph: HostGraph) -> list[list[str]]:
    """The modes of each call of `host.linear`, in order."""
    calls = [node for node in graph.graph.nodes if node.target == "linear"]
    return [[mode.source for mode in node.meta.get(MODES, ())] for node in calls]


def block(host: Host, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = host.linear(x)
        with torch.enable_grad():
            x = host.linear(x)
    return host.linear(x)


def decorated(host: Host, x: Tensor) -> Tensor:
    x = torch.no_grad()(host.linear)(x)
    return host.linear(torch.enable_grad()(host.linear)(x))


def called(host: Host, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    x = host.linear(x)
    torch.set_grad_enabled(True)
    return host.linear(host.linear(x))


@pytest.mark.parametrize("way", [block, decorated, called])
def test_gradients_switched_in_any_way_are_seen(way: Any) -> None:
    _, graph = traced(way)
    assert sources(graph) == [["torch.no_grad()"], [], []]
    assert graph.ambient == {"grad": True}


def test_what_switches_gradients_on_is_seen_where_the_caller_has_none() -> None:
    with torch.no_grad():
        _, graph = traced(block)
    assert sources(graph) == [[], ["torch.enable_grad()"], []]
    assert graph.ambient == {"grad": False}


def test_inference_mode_is_one_mode() -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = host.linear(x)
            with torch.inference_mode(False):
                x = host.linear(x)
        return host.linear(x)

    assert sources(traced(forward)[1]) == [["torch.inference_mode(True)"], [], []]
    with torch.inference_mode():
        host, graph = traced(forward)
    assert sources(graph) == [[], ["torch.inference_mode(False)"], []]
    assert set(graph.ambient) == {"inference"}
    assert not ambient_holds(graph.ambient, host, {"x": X})


def old_autocast(**options: Any) -> AbstractContextManager[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cpu.amp.autocast(**options)


@pytest.mark.parametrize("autocast", [lambda **o: torch.autocast("cpu", **o), old_autocast])
def test_autocast_decides_the_types_in_the_trace_and_in_a_replay(autocast: Any) -> None:
    def forward(host: Host, x: Tensor) -> Any:
        with autocast(dtype=torch.bfloat16):
            low = host.linear(x)
            with autocast(enabled=False):
                return low, host.linear(low.float())

    host, graph = traced(forward)
    assert sources(graph) == [["torch.autocast('cpu', dtype=torch.bfloat16)"], []]
    low, full = replay(host, graph.graph, {"x": X})
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(full, host(X)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sources(trace(host, {"x": X})) == [[], ["torch.autocast('cpu', enabled=False)"]]


def test_the_choice_of_attentions_is_seen() -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            x = host.linear(x)
        return F.relu(x)

    _, graph = traced(forward)
    assert sources(graph) == [["sdpa_kernel([SDPBackend.MATH], set_priority=True)"]]
    assert set(graph.ambient) == {"attention"}


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda: torch.is_grad_enabled(), "grad"),
        (lambda: torch.is_inference_mode_enabled(), "inference"),
        (lambda: torch.is_autocast_enabled("cpu"), "autocast"),
        (lambda: torch.get_autocast_dtype("cpu"), "autocast"),
        (lambda: grad_is_on(), "grad"),
        (lambda: autocast_is_on("cpu"), "autocast"),
        (lambda: torch.backends.cuda.flash_sdp_enabled(), "attention"),
        (lambda: None, None),
    ],
)
def test_what_python_reads_is_noted(read: Any, name: str | None) -> None:
    answers = []

    def forward(host: Host, x: Tensor) -> Tensor:
        answers.append(read())
        return host.linear(x)

    host, graph = traced(forward)
    assert answers == [read()]
    assert graph.ambient == ({name: getattr(state(), name)} if name else {})
    assert ambient_holds(graph.ambient, host, {"x": X})


def test_what_torch_reads_inside_a_leaf_is_not_noted() -> None:
    host = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True), nn.ReLU())
    host[0].eval()
    assert trace(host, {"input": X[None]}).ambient == {}


def test_what_another_thread_reads_is_not_noted() -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        other = threading.Thread(target=torch.is_grad_enabled)
        other.start()
        other.join()
        return host.linear(x)

    assert traced(forward)[1].ambient == {}


def questions(host: Host, x: Tensor) -> list[bool]:
    """All ways in which a flag is asked for."""
    h = host.linear(x)
    asked = [x, host.weight, h, h.detach(), h > 0, torch.zeros_like(h), x * 2]
    with torch.no_grad():
        frozen = host.linear(h)
        asked.append(frozen)
        with torch.enable_grad():
            asked.append(host.linear(frozen))
    written = x.clone()
    said = [written.requires_grad]
    written[0] = host.weight
    leaf = x.detach().clone()
    leaf.requires_grad = True
    asked += [written, leaf, leaf * 2]
    return said + [t.requires_grad for t in asked] + [t.is_leaf for t in asked]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_python_is_told_whether_a_tensor_requires_gradients(mode: Any, trained: bool) -> None:
    said = []

    def forward(host: Host, x: Tensor) -> Tensor:
        said.append(questions(host, x))
        return host.linear(x)

    host = Host(forward).requires_grad_(trained)
    with mode():
        x = X.clone()
        host(x)
        graph = trace(host, {"x": x})
        assert ambient_holds(graph.ambient, host, {"x": x})
        host.requires_grad_(not trained)
        assert not ambient_holds(graph.ambient, host, {"x": x})
    assert said[0] == said[1]


@pytest.mark.parametrize("raises", [True, False])
def test_a_trace_leaves_every_mode_as_it_was(raises: bool) -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        with torch.autocast("cpu"), sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            if raises:
                raise ZeroDivisionError
            return host.linear(x)

    before = state()
    functions = (torch.is_grad_enabled, torch._C._InferenceMode, torch.is_autocast_enabled)
    if raises:
        with pytest.raises(Exception, match="ZeroDivisionError"):
            traced(forward)
    else:
        traced(forward)
    assert state() == before
    assert functions == (torch.is_grad_enabled, torch._C._InferenceMode, torch.is_autocast_enabled)


def regions(graph: HostGraph) -> list[Any]:
    return [node.meta.get(CHECKPOINT) for node in graph.graph.nodes if node.target == "linear"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_nodes_of_a_checkpointed_call_say_so(reentrant: bool) -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(host.linear, x, use_reentrant=reentrant)

        x = host.linear(x)
        x = checkpoint(
            lambda x: inner(host.linear(x)), x, use_reentrant=reentrant, preserve_rng_state=False
        )
        return checkpoint(host.linear, x, use_reentrant=reentrant)

    outside, first, nested, second = regions(traced(forward)[1])
    assert outside is None
    assert first is nested
    assert first.options == {"preserve_rng_state": False}
    assert second.number != first.number
    assert second.options == {}


def test_a_checkpointed_call_that_fails_ends() -> None:
    def forward(host: Host, x: Tensor) -> Tensor:
        def fails(x: Tensor) -> Tensor:
            raise ZeroDivisionError

        with suppress(ZeroDivisionError):
            checkpoint(fails, x, use_reentrant=False)
        return host.linear(x)

    assert regions(traced(forward)[1]) == [None]
