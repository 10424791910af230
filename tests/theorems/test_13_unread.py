"""Theorem 13 of docs/theorems.md: without the rows that nobody reads, outputs and gradients are the
same, on every path."""

import operator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.theorems.case import BATCH, SEED, difference, fewer, tensors
from tests.toys.odd_blocks import Eager, Rope
from tests.toys.table import TOYS, Toy
from tests.toys.vit import HEADS, Attention, Block, Vit, pixels, randomize_weights
from tokenprune.analysis.unread import Unread, find_unread
from tokenprune.errors import PlanError, VerificationError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import load_recipe
from tokenprune.reductions import protocol
from tokenprune.rewrite import unread as rewriting
from tokenprune.runtime.model import pruning_of

REST = {
    "rope": Toy("rope_in_double", partial(Vit, 1, partial(Block, Rope)), 1),
    "eager": Toy("eager_in_double", partial(Vit, 2, partial(Block, Eager)), 2),
}
HOSTS = {name: TOYS[name] for name in ("timm_vit", "bool_mask", "talking_heads")}
METHODS: dict[str, dict[str, Any]] = {
    "learned": {"scorer": "learned"},
    "threshold": {"scorer": "learned", "sampling": {"selection": "threshold"}},
    "merge": {"mode": "merge"},
    "fuse": {"mode": "fuse"},
    "exact": {"mode": "exact"},
}


@lru_cache
def wrapped(host: str, method: str) -> Any:
    toy = (HOSTS | REST)[host]
    ratio, blocks = (1.0, [toy.depth - 1]) if method == "exact" else (0.6, list(toy.blocks))
    recipe = {
        "version": 1, "unread_rows": True, **METHODS[method],
        "schedule": {"blocks": blocks, "keep_ratio": ratio},
    }  # fmt: skip
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in toy.inputs().items()}
    options: Any = {"adapter": toy.facts, "example_inputs": inputs}
    return tokenprune.wrap(toy.build().double(), recipe, **options, verify=False, train=False)


Results = tuple[list[Tensor], list[Tensor]]


def results(model: nn.Module, inputs: dict[str, Any], seed: int, whole: bool) -> Results:
    """Outputs and gradients; `whole`, as a call that returns a trace has them."""
    model.zero_grad()
    with model.using(generator=torch.Generator().manual_seed(seed)):
        output = model(**inputs, return_trace=whole)
    found = tensors(output[0] if whole else output)
    sum(t.square().mean() for t in found).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [t.detach() for t in found], gradients


PAIRS = [
    *(("timm_vit", method) for method in METHODS),
    *(("bool_mask", "threshold"), ("talking_heads", "exact"), ("rope", "exact")),
    *(("eager", "learned"), ("eager", "merge")),
]


@pytest.mark.parametrize(("host", "method"), PAIRS)
@fewer
@given(seed=SEED, batch=BATCH, training=st.booleans())
def test_13_outputs_and_gradients_are_the_same(
    host: str, method: str, seed: int, batch: int, training: bool
) -> None:
    model, toy = wrapped(host, method), (HOSTS | REST)[host]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        randomize_weights(model, 5.0)
    quiet(model.train(training))
    inputs = toy.inputs(batch, seed=seed)
    inputs = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    ours, theirs = (results(model, inputs, seed, whole) for whole in (False, True))
    assert difference(ours[0], theirs[0]) < 1e-12
    floor = 1e-12 * max(float(g.abs().max()) for g in theirs[1])  # a bias of all scores has none
    pairs = [(a, b) for a, b in zip(ours[1], theirs[1], strict=True) if b.abs().max() > floor]
    assert difference(*zip(*pairs, strict=True)) < 1e-12
    programs = pruning_of(model).programs(inputs)
    assert programs.reduction.unread(pruning_of(model).host).costly


def quiet(model: nn.Module) -> None:
    """No dropout: fewer rows draw other noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout_p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class Biased(Attention):
    """With a bias for each pair of tokens of one image size."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, HEADS, 18, 18))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


class TwoRead(Vit):
    """Its head reads two prefix tokens."""

    def __init__(self) -> None:
        super().__init__(2, partial(Block, Biased))

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0] + x[:, 1].tanh()


def rows_too_few(found: Unread) -> Unread:
    return replace(found, rows=found.rows - 1)


def bias_forgotten(found: Unread) -> Unread:
    kept = {k: dim for k, dim in found.slices.items() if k[1].op != "get_attr"}
    assert len(kept) == len(found.slices) - 1
    return replace(found, slices=kept)


def sizes_forgotten(found: Unread) -> Unread:
    assert found.numbers
    return replace(found, numbers=frozenset())


def residual_forgotten(found: Unread) -> Unread:
    kept = {k: dim for k, dim in found.slices.items() if k[0].target is not operator.add}
    assert len(kept) == len(found.slices) - 1
    return replace(found, slices=kept)


def last_rows(x: Tensor, dim: int, rows: int) -> Tensor:
    return x.narrow(dim, x.shape[dim] - rows, rows)


FAULTS = (rows_too_few, bias_forgotten, sizes_forgotten, residual_forgotten)


@pytest.mark.parametrize("method", ["exact", "token-norm-k0.6"])
def test_a_pass_with_a_fault_is_refused(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = TwoRead().eval()
    randomize_weights(host, 50.0)
    facts = ArchSpec(blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=2, norm="norm")
    recipe = load_recipe(method).model_copy(update={"unread_rows": True})
    options: Any = {"adapter": facts, "example_inputs": pixels(2, 16), "train": False}
    model = tokenprune.wrap(host, recipe, **options)
    assert any("unread" in check.name for check in tokenprune.verify(model).checks)
    for fault in FAULTS:
        with monkeypatch.context() as patch:
            patch.setattr(protocol, "find_unread", lambda *given, f=fault: f(find_unread(*given)))
            with pytest.raises(VerificationError, match=r"leaves out are read|path fails at"):
                tokenprune.wrap(host, recipe, **options)
    monkeypatch.setattr(rewriting, "first_rows", last_rows)
    with pytest.raises(VerificationError, match="leaves out are read"):
        tokenprune.wrap(host, recipe, **options)


def test_where_all_rows_are_read_nothing_changes_and_exact_says_who_reads() -> None:
    toy = TOYS["mean_and_max"]
    with pytest.raises(PlanError, match=r"exact.*'(mean|amax)'.*reads those of all tokens"):
        tokenprune.wrap(toy.build(), "exact", adapter=toy.facts, example_inputs=toy.inputs())
    recipe = {**toy.recipe, "unread_rows": True}
    model = tokenprune.wrap(
        toy.build(), recipe, adapter=toy.facts, example_inputs=toy.inputs(), verify=False
    )
    programs = pruning_of(model).programs(toy.inputs())
    assert not programs.reduction.unread(pruning_of(model).host).narrowed


def test_a_hook_and_a_trace_are_readers() -> None:
    model = wrapped("eager", "exact").eval()
    inputs = {"x": pixels(2, 16).double()}
    dense = pruning_of(model).host(**inputs)
    _, trace = model(**inputs, return_trace=True)
    assert trace.stages == []
    assert trace.patch_tokens.shape == (2, 16, 16)
    assert difference([model(**inputs)], [dense]) < 1e-12
    seen = list[tuple[int, ...]]()
    hook = model.blocks[1].mlp.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    model(**inputs)
    hook.remove()
    assert seen == [(2, 18, 16)]
    macs = tokenprune.profile(model)
    assert macs.macs_per_block[0] == macs.dense_macs_per_block[0]
    assert macs.macs_per_block[1] < 0.5 * macs.dense_macs_per_block[1]
    with pytest.raises(PlanError, match="prunes nothing"):
        model.set_keep_ratio(0.5)
