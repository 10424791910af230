"""Hosts whose tensors are no plain ones are traced on plain fake tensors of the same shape."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

import tokenprune
from tests.toys.vit import Vit, pixels
from tests.tracing.function_host import WIDTH, Host, replay
from tokenprune.errors import TraceError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.host_graph import trace

RECIPE = {"version": 1, "schedule": {"blocks": [0, 2], "keep_ratio": 0.6}}
BLOCKS = tuple(f"blocks.{i}" for i in range(3))
SPEC = ArchSpec(adapter="toy", blocks=BLOCKS, num_prefix_tokens=1, norm="norm")


class Quantized(Tensor):
    """Whole numbers and a scale that look like a float tensor, as torchao's do."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> "Quantized":
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.numbers, made.scale = numbers, scale
        return made  # type: ignore[no-any-return]

    def __init__(self, numbers: Tensor, scale: Tensor) -> None: ...

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "Quantized"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].numbers, args[0].scale)
        if any(type(a).__name__ == "FakeTensor" for a in args):
            raise NotImplementedError(f"{func} of a quantized tensor and a fake one")

        def real(x: Any) -> Any:
            return x.numbers * x.scale if isinstance(x, Quantized) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


def quantize(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().max() / 100
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Quantized(numbers, scale), requires_grad=False)


@pytest.mark.parametrize("before", [True, False])
def test_a_quantized_host_is_pruned(before: bool) -> None:
    torch.manual_seed(0)
    host, x = Vit().eval(), pixels(2, 16, 0)
    if before:
        quantize(host)
    weight = host.head.weight
    model = tokenprune.wrap(host, RECIPE, example_inputs=x, adapter=SPEC, verify=before)
    if not before:
        quantize(host)
        model._pruning.cache.clear()
    assert not before or host.head.weight is weight
    every = [torch.arange(16).expand(2, -1)] * 2
    for path in ("gather", "mask"):
        with torch.no_grad(), model.using(path, keep_indices=every):
            torch.testing.assert_close(model(x), host(x))
    assert type(host.head.weight) is Quantized
    assert tokenprune.profile(model).macs > 0


def test_the_real_tensors_are_back_after_a_failure() -> None:
    host = Host(lambda host, x: host.linear(x) if (x.sum() + host.plain.sum()) > 0 else x)
    quantize(host)
    host.plain = Quantized(torch.ones(1, WIDTH, dtype=torch.int8), torch.tensor(2.0))
    held = [dict(vars(m), **m._parameters, **m._buffers) for m in host.modules()]
    with pytest.raises(TraceError, match="Python asks for a value"):
        trace(host, {"x": torch.ones(2, WIDTH)})
    found = [dict(vars(m), **m._parameters, **m._buffers) for m in host.modules()]
    for ours, theirs in zip(found, held, strict=True):
        assert all(ours[name] is theirs[name] for name in theirs)


def test_what_is_tied_stays_tied() -> None:
    def both(host: Host, x: Tensor) -> Tensor:
        assert host.linear.weight is host.inner["deep"][0].weight
        return host.linear(x) @ host.linear.weight + host.inner["deep"](x)

    host = Host(both)
    quantize(host)
    host.inner["deep"][0].weight = host.linear.weight
    graph = trace(host, {"x": torch.ones(2, WIDTH)}).graph
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(replay(host, graph, {"x": x}), host(x))


def test_inputs_and_parameters_of_torch_func() -> None:
    host = Host(lambda host, x: (host.linear(x) * host.weight).reshape(x.shape[0], -1))
    graphs = []

    class Traces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host = host

        def forward(self, x: Tensor) -> Tensor:
            graphs.append(trace(self.host, {"x": x}).graph)
            return self.host(x).sum()  # type: ignore[no-any-return]

    model = Traces()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],))  # type: ignore[no-any-return]

    found = vmap(grad(loss), (None, 0))(weights, torch.randn(3, WIDTH))
    assert found["host.linear.weight"].shape == (3, WIDTH, WIDTH)
    x = torch.randn(4, WIDTH)
    assert torch.equal(replay(host, graphs[0], {"x": x}), host(x))
