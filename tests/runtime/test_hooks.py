"""Hooks on modules that are traced through: when they run, what they see, what they may do."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

import tokenprune
from tests.theorems.case import same_bits
from tests.toys.odd_blocks import Torchs
from tests.toys.table import TOYS, Toy
from tests.toys.vit import Block, Vit
from tests.zoo.hosts import ZOO
from tests.zoo.hosts_grid import GRID
from tokenprune.errors import HostError, TokenPruneWarning, VerificationError
from tokenprune.tracing import hook_nodes

Calls = list[tuple[str, str, list[tuple[int, ...]]]]
PATHS = ("mask", "gather", "jagged")
EVERY: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Tensor]]]] = {}


def _toy(toy: Toy) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    host = toy.build()
    return host, toy.wrap(host, verify=False, train=False), toy.inputs()


def _row(row: Any) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    host, inputs = row.build(1.0), row.inputs()
    model = tokenprune.wrap(host, row.recipe, example_inputs=inputs, verify=False, train=False)
    return host, model, inputs


for _each in TOYS.values():
    if _each.name in ("prefix_1", "rope_by_length", "torchs", "in_place", "shared"):
        EVERY[_each.name] = lambda toy=_each: _toy(toy)  # type: ignore[misc]
for _each in (*ZOO, *GRID):
    if _each.core and _each.name in ("deit", "swin"):
        EVERY[f"zoo_{_each.name}"] = lambda row=_each: _row(row)  # type: ignore[misc]


def shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def every_module_hooked(host: nn.Module) -> Iterator[Calls]:
    calls: Calls = []
    paths = {module: path for path, module in host.named_modules() if path}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(("before", paths[module], shapes((args, kwargs))))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(("after", paths[module], shapes(output)))

    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in paths]
    handles += [m.register_forward_hook(after, with_kwargs=True) for m in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output(model: Any, path: str, inputs: dict[str, Tensor]) -> Any:
    model.set_threshold(0.5 if path == "jagged" else None)
    with torch.no_grad(), model.using("gather" if path == "jagged" else path):
        return model(**inputs)


FAST = ("rope_by_length", "zoo_deit")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in EVERY],
)
def test_hooks_on_every_module_change_nothing_and_run_as_in_the_host(name: str) -> None:
    host, model, inputs = EVERY[name]()
    wanted = {path: output(model, path, inputs) for path in PATHS}
    with every_module_hooked(host) as calls:
        host.forward(**inputs)
        dense = calls.copy()
        for path in PATHS:
            calls.clear()
            found = output(model, path, inputs)
            if path == "jagged":  # without hooks tokens are packed
                for a, b in zip(tree_leaves(found), tree_leaves(wanted[path]), strict=True):
                    torch.testing.assert_close(a, b)
            else:
                assert same_bits(found, wanted[path])
            assert [call[:2] for call in calls] == [call[:2] for call in dense]
            if path == "mask":
                assert calls == dense
        model.set_threshold(None)
        tokenprune.verify(model, inputs)
    calls.clear()
    assert same_bits(output(model, "gather", inputs), wanted["gather"])
    assert not calls


@pytest.fixture(scope="module")
def toy() -> Toy:
    return TOYS["prefix_1"]  # stages at blocks 1 and 2: 16 -> 9 -> 5 patches


@pytest.fixture(scope="module")
def wrapped(toy: Toy) -> Any:
    return toy.wrap(verify=False, train=False)


@pytest.fixture
def model(wrapped: Any) -> Iterator[Any]:
    """A wrapped toy without hooks."""
    yield wrapped.eval()
    assert not any(m._forward_hooks or m._backward_hooks for m in wrapped.modules())
    assert not hook_nodes.OPEN.records
    wrapped.zero_grad()


def test_a_pre_hook_where_a_stage_is_sees_the_tokens_after_it(toy: Toy, model: Any) -> None:
    seen: list[Any] = []
    with model.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(shapes(args))):
        model(**toy.inputs())
    assert seen == [[(2, 10, 16)]]


@pytest.mark.parametrize("name", ["blocks.2.norm2", "blocks.2.mlp"], ids=["leaf", "traced"])
def test_hooks_run_once_where_images_differ(toy: Toy, model: Any, name: str) -> None:
    seen: list[Any] = []
    inputs = toy.inputs(batch=4)
    sets = [torch.tensor([list(range(k)) + [-1] * (9 - k) for k in (9, 3, 5, 2)])] * 2
    model.set_threshold(0.5)
    with torch.no_grad(), model.using("gather", keep_indices=sets):
        wanted = model(**inputs)
        with model.get_submodule(name).register_forward_hook(lambda m, a, o: seen.append(o)):
            found = model(**inputs)
    model.set_threshold(None)
    assert [len(tokens) for tokens in seen] == [4]
    torch.testing.assert_close(found, wanted)


class _Twice(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return 2 * self.block(0.5 * x)


@pytest.mark.filterwarnings("ignore:hook ")
@pytest.mark.parametrize("path", ["mask", "gather"])
def test_what_hooks_return_goes_on(toy: Toy, model: Any, path: str) -> None:
    written = copy.deepcopy(model._pruning.host)
    written.blocks[2] = _Twice(written.blocks[2])
    other = toy.wrap(written, verify=False, train=False)
    other.token_predictors.load_state_dict(model.token_predictors.state_dict())
    block = model.blocks[2]
    before = block.register_forward_pre_hook(lambda m, args: args[0] * 0.5)
    named = block.register_forward_hook(lambda m, a, kw, out: out * 2, with_kwargs=True)
    with before, named:
        assert same_bits(output(model, path, toy.inputs()), output(other, path, toy.inputs()))


@pytest.mark.parametrize("path", ["blocks.2", "blocks.2.mlp.0", "blocks.2.mlp.1"])
def test_a_hook_that_changes_values_is_said_on_modules_of_torch_too(path: str) -> None:
    toy = TOYS["prefix_1"]
    model = toy.wrap(toy.build(), verify=False, train=False)
    hooked = model.get_submodule(path)
    with torch.no_grad(), hooked.register_forward_hook(lambda m, args, y: None):
        model(**toy.inputs())
    handle = hooked.register_forward_hook(lambda m, args, y: y - y.mean(1, keepdim=True))
    said = rf"hook .*changes values of module '{path}'"
    with torch.no_grad(), handle, pytest.warns(TokenPruneWarning, match=said):
        model(**toy.inputs())


class _Channels(nn.Module):
    """A module of channels first, run on tokens."""

    def __init__(self, inner: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Any:
        return self.inner(x.transpose(1, 2)).transpose(1, 2) * self.factor


def doubled_in_place(_: nn.Module, __: Any, y: Tensor) -> None:
    y.data.mul_(2)


@pytest.mark.parametrize("inner", [nn.Conv1d(24, 24, 1), nn.BatchNorm1d(24).eval()])
def test_a_hook_that_writes_past_torch_is_said_on_what_rules_know_by_class(inner: Any) -> None:
    toy = TOYS["prefix_1"]
    host: Any = toy.build()
    host.blocks[2].mlp[1] = _Channels(inner)
    model = toy.wrap(host, verify=False, train=False)
    wanted = copy.deepcopy(model)
    wanted.blocks[2].mlp[1].factor = 2.0
    said = r"hook .*changes values of module 'blocks\.2\.mlp\.1\.inner'"
    handle = inner.register_forward_hook(doubled_in_place)
    with handle, pytest.warns(TokenPruneWarning, match=said):
        assert same_bits(
            output(model, "gather", toy.inputs()), output(wanted, "gather", toy.inputs())
        )


def test_hooks_come_and_go_without_a_new_trace(toy: Toy, model: Any) -> None:
    inputs, seen = toy.inputs(), list[str]()
    wanted = output(model, "gather", inputs)
    programs = model._pruning.cache.info().programs
    for _ in range(2):
        first = model.blocks[0].register_forward_hook(lambda *_: seen.append("first"))
        output(model, "gather", inputs)
        with model.blocks[0].register_forward_hook(lambda *_: seen.append("second")):
            output(model, "gather", inputs)
        first.remove()
        assert same_bits(output(model, "gather", inputs), wanted)
    assert seen == ["first", "first", "second"] * 2
    assert model._pruning.cache.info().programs == programs + 1


def test_grad_cam(toy: Toy, model: Any) -> None:
    """Activations by forward hooks, gradients by backward hooks; of a block and of the norm."""
    activations: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    handles = []
    for name in ("blocks.2", "norm"):
        module = model.get_submodule(name)

        def keep(m: Any, args: Any, out: Tensor, name: str = name) -> None:
            activations[name] = out

        def take(m: Any, into: Any, out: Any, name: str = name) -> None:
            gradients[name] = out[0]

        handles += [
            module.register_forward_hook(keep),
            module.register_full_backward_hook(take),
        ]
    score = model(**toy.inputs())[:, 1].sum()
    wanted = torch.autograd.grad(score, list(activations.values()), retain_graph=True)
    score.backward()
    for handle in handles:
        handle.remove()
    for name, gradient in zip(activations, wanted, strict=True):
        assert activations[name].shape[1] == 1 + 5
        torch.testing.assert_close(gradients[name], gradient)


@pytest.mark.parametrize("path", ["mask", "gather"])
def test_backward_hooks_change_gradients_as_in_the_host(toy: Toy, model: Any, path: str) -> None:
    inputs, block = toy.inputs(), model.blocks[2]
    every = [torch.arange(16).expand(2, -1)] * 2

    def gradients(path: str) -> list[Tensor]:
        model.zero_grad()
        before = block.register_full_backward_pre_hook(lambda m, out: (out[0] * 2,))
        after = block.register_full_backward_hook(lambda m, into, out: (into[0] * 3,))
        forced = None if path == "dense" else every
        with before, after, model.using(path, keep_indices=forced):
            model(**inputs).sum().backward()
        return [
            model.get_parameter(f"{name}.weight").grad.clone()
            for name in ("blocks.1.attn.qkv", "blocks.2.attn.qkv", "head")
        ]

    for ours, theirs in zip(gradients(path), gradients("dense"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_pass_hooks_of_a_training_step(toy: Toy, model: Any) -> None:
    def step() -> list[Tensor]:
        model.zero_grad()
        with model.using(generator=torch.Generator().manual_seed(0)):
            model(**toy.inputs()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    wanted = step()
    with model.blocks[1].register_full_backward_hook(lambda *_: None):
        for ours, theirs in zip(step(), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (lambda m, args, out: out[:, 1:], r"float32\[2, 10, 16\] became float32\[2, 9, 16\]"),
        (lambda m, args, out: (out,), "another structure"),
        (lambda m, args, out: out.double(), r"became float64\[2, 10, 16\]"),
    ],
    ids=["tokens", "structure", "dtype"],
)
def test_a_hook_that_cannot_be_served_is_refused(
    toy: Toy, model: Any, hook: Any, said: str
) -> None:
    with model.blocks[1].register_forward_hook(hook), pytest.raises(HostError) as caught:
        model(**toy.inputs())
    assert caught.match(r"module 'blocks.1' \(tests.runtime.test_hooks.<lambda>\)")
    assert caught.match(said)


def test_a_hook_that_changes_a_flag_is_refused() -> None:
    """The way to attention maps of `nn.MultiheadAttention`: its weights are not formed here."""
    toy = TOYS["torchs"]
    model = toy.wrap(verify=False, train=False)

    def ask(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "need_weights": True}

    inner = model.blocks[1].attn.inner
    assert isinstance(model.blocks[1].attn, Torchs)
    with inner.register_forward_pre_hook(ask, with_kwargs=True):  # noqa: SIM117
        with pytest.raises(HostError, match=r"blocks\.1\.attn\.inner"):
            model(**toy.inputs())


def test_hooks_for_all_modules_run_on_those_that_are_traced_through(toy: Toy, model: Any) -> None:
    seen: list[nn.Module] = []
    with torch_module.register_module_forward_hook(lambda m, *_: seen.append(m)):
        model(**toy.inputs())
    host = [module for module in seen if module in set(model._pruning.host.modules())]
    assert host.count(model.blocks[1]) == host.count(model.norm) == seen.count(model) == 1
    gradients: list[nn.Module] = []
    with torch_module.register_module_full_backward_hook(lambda m, *_: gradients.append(m)):
        model(toy.inputs()["x"].requires_grad_()).sum().backward()
    assert gradients.count(model.blocks[1].mlp) == 1


@pytest.mark.parametrize("pruned", [True, False])
def test_hooks_that_are_always_called_are_called_after_an_error(
    toy: Toy, model: Any, pruned: bool
) -> None:
    seen: list[str] = []

    def fail(*_: Any) -> None:
        raise ValueError("in a hook")

    block = model.blocks[1]
    always = block.register_forward_hook(lambda *_: seen.append("block"), always_call=True)
    inner = block.attn.register_forward_hook(lambda *_: seen.append("attn"), always_call=True)
    path = "gather" if pruned else "dense"
    with always, inner, block.mlp[1].register_forward_hook(fail), model.using(path):  # noqa: SIM117
        with pytest.raises(ValueError, match="in a hook"):
            model(**toy.inputs())
    assert seen == ["attn", "block"]


@pytest.mark.filterwarnings("ignore:hook ")
def test_copies_have_hooks_of_their_own(toy: Toy, model: Any) -> None:
    inputs = toy.inputs()
    plain = output(model, "gather", inputs)
    with model.blocks[2].register_forward_hook(lambda m, args, out: out * 2):
        other = copy.deepcopy(model)
        edited = output(model, "gather", inputs)
    assert same_bits(output(model, "gather", inputs), plain)
    assert same_bits(output(other, "gather", inputs), edited)


def test_a_hook_that_changes_values_after_the_proof_is_said(toy: Toy, model: Any) -> None:
    """Those that only look are not, nor those that `verify` has seen."""
    inputs, block = toy.inputs(), model.blocks[2]
    with block.register_forward_hook(lambda *_: None):
        output(model, "gather", inputs)
    mixes = block.register_forward_hook(lambda m, args, out: out - out.mean(1, keepdim=True))
    with pytest.warns(TokenPruneWarning, match=r"^hook .*blocks\.2.*tokenprune\.verify\(model\)"):
        output(model, "gather", inputs)
    with pytest.raises(VerificationError):
        tokenprune.verify(model, inputs)
    mixes.remove()
    said = pytest.warns(TokenPruneWarning, match="It changes values of module 'blocks.2'")
    with block.register_forward_pre_hook(lambda m, args: (args[0].mul_(1.0),)), said:
        output(model, "gather", inputs)
    with block.register_forward_pre_hook(lambda m, args: (args[0] * 2,)):
        tokenprune.verify(model, inputs)
        output(model, "gather", inputs)


class _Collects(Vit):
    """Reads what hooks of its own collect."""

    def __init__(self) -> None:
        super().__init__(1, Block)
        self.kept: list[Tensor] = []
        self.blocks[1].register_forward_hook(lambda m, args, out: self.kept.append(out))

    def forward(self, x: Tensor) -> Any:
        self.kept.clear()
        return super().forward(x) + self.head(self.kept[0][:, 0])


def test_hooks_of_the_hosts_own_code_are_traced(toy: Toy) -> None:
    host = _Collects().eval()
    model = toy.wrap(host)  # the certificate compares with the host
    host.kept.clear()
    model(**toy.inputs())
    assert len(host.kept) == 1  # what the host's own forward leaves there
    seen: list[Any] = []
    with host.blocks[1].register_forward_hook(lambda m, args, out: seen.append(out)):
        model(**toy.inputs())
    assert len(seen) == 1
    assert len(host.kept) == 1


def test_a_hook_may_take_itself_away() -> None:
    _, model, inputs = _toy(TOYS["prefix_1"])
    wanted, seen = model(**inputs), list[Any]()

    def once(module: nn.Module, args: Any, output: Tensor) -> None:
        handle.remove()
        seen.append(output.shape)

    handle = model.blocks[1].register_forward_hook(once)
    for _ in range(2):
        assert torch.equal(model(**inputs), wanted)
    assert len(seen) == 1
