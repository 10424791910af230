"""Calls of a wrapped model: every signature, every argument, a batch of no image, torch.func."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import tokenprune
from tests.toys.vit import Vit, pixels
from tokenprune.errors import HostError, TraceError
from tokenprune.hosts.spec import ArchSpec

RECIPE = {"version": 1, "schedule": {"blocks": [0, 2], "keep_ratio": 0.6}}
BLOCKS = tuple(f"blocks.{i}" for i in range(3))
SPEC = ArchSpec(adapter="toy", blocks=BLOCKS, num_prefix_tokens=1, norm="norm")
X = pixels(2, 16, 0)


@dataclass
class Sizes:
    scale: Tensor
    shift: float = 0.0


def wrapped(host: type[nn.Module], *example: Any, **named: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    dense = host().eval()
    given = named or example
    options: dict[str, Any] = {"example_inputs": given, "adapter": SPEC, "verify": False}
    return dense, tokenprune.wrap(dense, RECIPE, **options, train=False)


class Star(Vit):
    def forward(self, *images: Tensor) -> Tensor:
        return super().forward(torch.cat(images, -1) if len(images) > 1 else images[0])


class Wrapper(Vit):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        return super().forward(*a, **k)


class KeywordOnly(Vit):
    def forward(self, x: Tensor, *, scale: float | None = 1.0) -> Tensor:
        return super().forward(x) * (7.0 if scale is None else scale)


class Nested(Vit):
    def forward(self, batch: dict[str, list[Tensor]], sizes: Sizes | None = None) -> Tensor:
        out = super().forward(torch.cat(batch["halves"], -1))
        return out if sizes is None else out * sizes.scale + sizes.shift


def same_at_full_ratio(host: nn.Module, model: Any, *args: Any, **kwargs: Any) -> None:
    """What the host says, on the eval and on the training path."""
    model.set_keep_ratio(1.0)
    every = [torch.arange(16).expand(2, -1)] * 2
    for path in ("gather", "mask"):
        with torch.no_grad(), model.using(path, keep_indices=every):
            torch.testing.assert_close(model(*args, **kwargs), host(*args, **kwargs))
    with torch.no_grad():
        torch.testing.assert_close(model(*args, **kwargs), host(*args, **kwargs))


def test_a_host_with_star_arguments() -> None:
    host, model = wrapped(Star, X)
    same_at_full_ratio(host, model, X)
    model.set_keep_ratio(0.6)
    with torch.no_grad():
        assert model(X[..., :8], X[..., 8:]).equal(model(X))
    tokenprune.verify(model, (X,))
    with pytest.raises(TypeError, match="unexpected keyword"):
        host(x=X)
    with pytest.raises(HostError, match=r"takes \(\), but was called with \(x\)"):
        model(x=X)


def test_a_host_that_takes_anything() -> None:
    host, model = wrapped(Wrapper, X)
    same_at_full_ratio(host, model, X)
    same_at_full_ratio(host, model, x=X)
    tokenprune.verify(model, {"x": X})


def test_plain_arguments_that_change_have_a_program_each() -> None:
    host, model = wrapped(KeywordOnly, X)
    for scale in (1.0, 2.0, None, 1, True, 2.0):
        same_at_full_ratio(host, model, X, scale=scale)
    same_at_full_ratio(host, model, x=X)
    assert model._pruning.cache.info().programs == 6  # left out, and five kinds of scale


def test_nan_is_one_value() -> None:
    _, model = wrapped(KeywordOnly, X)
    for _ in range(3):
        with torch.no_grad():
            assert model(X, scale=float("nan")).isnan().all()
    assert model._pruning.cache.info().programs == 2


def test_tensors_in_containers_are_inputs() -> None:
    batch = {"halves": [X[..., :8], X[..., 8:]]}
    host, model = wrapped(Nested, batch)
    tokenprune.verify(model, (batch,))
    sizes, others = Sizes(torch.tensor(3.0), 0.5), Sizes(torch.tensor(5.0), 0.5)
    for given in ((batch,), (batch, sizes), ({"halves": batch["halves"][::-1]}, others)):
        same_at_full_ratio(host, model, *given)
    assert model._pruning.cache.info().programs == 2
    scale = torch.tensor(2.0, requires_grad=True)
    model.train()(batch, Sizes(scale)).sum().backward()
    assert scale.grad is not None


def test_what_cannot_be_an_argument_is_refused() -> None:
    _, model = wrapped(Wrapper, X)
    with pytest.raises(HostError, match=r"Argument hook\['a'\] of Wrapper is a Generator"):
        model(X, hook={"a": torch.Generator()})


PATHS: dict[str, Callable[[Any], Any]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "threshold": lambda m: (m.eval(), m.set_threshold(0.5)),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_an_empty_batch_gives_what_the_host_gives(path: str, first: bool) -> None:
    host, model = wrapped(Vit, X)
    none = X[:0].clone().requires_grad_()
    PATHS[path](model)
    model._pruning.cache.clear()
    if not first:
        model(X)
    out = model(none)
    assert out.shape == host(none).shape
    out.sum().backward()
    assert none.grad is not None
    taught = dict(model.named_parameters()) if path == "train" else dict(host.named_parameters())
    used = {n for n, p in taught.items() if p.grad is not None}
    assert {"head.weight", "blocks.0.attn.qkv.weight"} <= used
    assert all(not p.grad.any() for p in taught.values() if p.grad is not None)
    assert model(X).shape == (2, *out.shape[1:])


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_batch_on_a_bypass_host(path: str) -> None:
    recipe = {**RECIPE, "mode": "bypass"}
    host = Vit().eval()
    model = tokenprune.wrap(host, recipe, example_inputs=X, adapter=SPEC, verify=False)
    PATHS[path](model)
    assert model(X[:0]).shape == host(X[:0]).shape == (0, 5)
    model(X)
    assert model(X[:0]).shape == (0, 5)


def test_a_host_that_branches_on_the_batch_size_refuses_an_empty_batch() -> None:
    class Branches(Vit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[0] > 1 else x * 2)

    _, model = wrapped(Branches, X)
    with pytest.raises(HostError, match=r"empty batch.*one image at least"):
        model(X[:0])


def per_image(model: Any, x: Tensor, **options: Any) -> tuple[dict[str, Tensor], Any]:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, weights, (image[None],)).square().sum()  # type: ignore[no-any-return]

    return vmap(grad(loss), (None, 0), **options)(weights, x), weights


def test_gradients_of_each_image_by_torch_func() -> None:
    """Also where this is the first call, which traces."""
    _, model = wrapped(Vit, X)
    model._pruning.cache.clear()
    with model.train().using("mask", keep_indices=[torch.arange(9)[None], torch.arange(4)[None]]):
        found, _ = per_image(model, X)
        for i in range(2):
            model.zero_grad()
            model(X[i : i + 1]).square().sum().backward()
            for name, p in model.named_parameters():
                wanted = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(found[name][i], wanted)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_ensemble_by_torch_func() -> None:
    models = [wrapped(Vit, X)[1] for _ in range(2)]
    base = copy.deepcopy(models[0]).to("meta")
    weights, buffers = stack_module_state(models)
    found = vmap(lambda w, b: functional_call(base, (w, b), (X,)))(weights, buffers)
    torch.testing.assert_close(found, torch.stack([model(X) for model in models]))


def test_sampled_decisions_by_torch_func() -> None:
    _, model = wrapped(Vit, X)
    found, weights = per_image(model.train(), X, randomness="different")
    assert {n: g.shape[1:] for n, g in found.items()} == {n: w.shape for n, w in weights.items()}
    assert found["head.weight"].abs().sum() > 0


class Matches(Vit):
    """A detector's loss: labels are a list of dicts, and Python matches them by value."""

    def forward(self, x: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        out = super().forward(x)
        if labels is None:
            return {"logits": out}
        criterion = nn.CrossEntropyLoss().to(out.device)
        targets = torch.cat([label["classes"] for label in labels])
        if self.by_value and out.argmax() == targets[0]:
            return {"loss": out.sum()}
        return {"logits": out, "loss": criterion(out, targets)}

    by_value = False


def test_labels_as_a_list_of_dicts() -> None:
    host, model = wrapped(Matches, X)
    labels = [{"classes": torch.tensor([1])}, {"classes": torch.tensor([3])}]
    model.set_keep_ratio(1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(X, labels), host(X, labels))
    model.train()(X, labels)["loss"].backward()
    host.by_value = True
    model._pruning.cache.clear()
    with pytest.raises(TraceError, match=r"out\.argmax\(\) ==.*leave the labels out and compute"):
        model(X, labels)
    assert model(X)["logits"].shape == (2, 5)
