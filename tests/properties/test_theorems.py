"""The eight theorems of docs/theorems.md, each a property over every toy host."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.properties.hosts import GAPS, PREFIXES, TOYS, Toy
from tests.properties.vit import PATCH, toughen
from tokenprune.counting import num_keep
from tokenprune.passes.base import PREDICTORS

# Largest difference that rounding may cause, relative to the scale of the output.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A random network with attention weights x50 amplifies the rounding of fp32 without limit, so its
# proof is in float64. The toys are small enough to hold 1e-4 in fp32 as well.
FACTORS = (1.0, 50.0)
RATIO = 0.6
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30, 3.0)

few = settings(max_examples=5)
fewer = settings(max_examples=2)
SEED = st.integers(0, 2**16)
BATCH = st.sampled_from([1, 2, 3])


class Case(NamedTuple):
    """A toy, wrapped once for all tests on it."""

    toy: Toy
    host: nn.Module
    model: Any
    keys: list[str]

    def start(self, seed: int, factor: float = 1.0) -> None:
        """Eval mode, the recipe's ratio, no gradients; new weights, predictors included."""
        self.model.eval().zero_grad()
        self.model.set_keep_ratio(RATIO)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            toughen(self.model, factor)

    @property
    def stages(self) -> int:
        return len(self.toy.blocks)

    @property
    def bound(self) -> float:
        return BOUNDS[self.toy.dtype]

    @property
    def garbage(self) -> st.SearchStrategy[float]:
        """What may stand in pixels. torch's own bf16 convolution spreads NaN over the image."""
        return st.sampled_from((3.0, 1e4) if self.toy.dtype == torch.bfloat16 else GARBAGE)


@pytest.fixture(scope="module", params=TOYS.values(), ids=lambda toy: toy.name)
def case(request: pytest.FixtureRequest) -> Case:
    toy: Toy = request.param
    host = toy.build()
    keys = list(host.state_dict())
    return Case(toy, host, toy.wrap(host), keys)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order, whatever holds them."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output):
        output = [getattr(output, f.name) for f in fields(output)]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in tensors(part)] if isinstance(output, tuple | list) else []


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference relative to the scale of `theirs`; NaN if one of them is."""
    assert theirs
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    errors = [
        ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        for a, b in zip(ours, theirs, strict=True)
    ]
    return float(torch.tensor(errors).max())  # NaN wins


def same_bits(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    return all(torch.equal(a, b) for a, b in pairs)


def patches(size: int) -> int:
    return (size // PATCH) ** 2


@st.composite
def nested_sets(draw: st.DrawFn, stages: int, size: int, batch: int) -> list[Tensor]:
    """Kept sets in any order, each in the one before: of one patch, of all, or in between."""
    generator = torch.Generator().manual_seed(draw(SEED))
    kept, sets = torch.arange(patches(size)).expand(batch, -1), []
    for _ in range(stages):
        most = kept.shape[1]
        count = draw(st.sampled_from([1, most]) | st.integers(1, most))
        order = torch.rand(kept.shape, generator=generator).argsort(dim=1)[:, :count]
        kept = kept.gather(1, order)
        sets.append(kept)
    return sets


def sizes(case: Case) -> st.SearchStrategy[int]:
    return st.sampled_from(case.toy.sizes)


def run(case: Case, inputs: dict[str, Tensor], path: str, sets: Any = None) -> tuple[Any, Any]:
    with torch.no_grad(), case.model.using(path, keep_indices=sets):
        return case.model(**inputs, return_trace=True)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention has another kernel for eval, with other rounding, that no graph has."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@few
@given(data=st.data(), seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_1_keeping_every_token_is_the_host_bit_for_bit(
    case: Case, data: st.DataObject, seed: int, batch: int, factor: float
) -> None:
    case.start(seed, factor)
    inputs = case.toy.inputs(batch, data.draw(sizes(case)), seed)
    case.model.set_keep_ratio(1.0)
    with torch.no_grad():
        dense = case.host(**inputs)
        assert same_bits(case.model(**inputs), dense)
        with no_fast_path():
            dense = case.host(**inputs)
    for path in ("gather", "dense"):  # with a trace it is the rewritten graph that runs
        output, trace = run(case, inputs, path)
        assert same_bits(output, dense)
        assert type(output) is type(dense)
        assert len(trace.stages) == (case.stages if path == "gather" else 0)


def test_1_unwrap_is_the_host_bit_for_bit(case: Case) -> None:
    case.start(0)
    fresh = case.toy.build()  # never wrapped
    case.model.load_state_dict(fresh.state_dict())
    for size in case.toy.sizes:
        inputs = case.toy.inputs(3, size)
        with torch.no_grad():
            dense = fresh(**inputs)
            assert not same_bits(case.model(**inputs), dense)  # it does prune
            host = tokenprune.unwrap(case.model)
            assert host is case.host
            assert same_bits(host(**inputs), dense)


@settings(max_examples=8)
@given(data=st.data(), seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_2_mask_path_is_gather_path(
    case: Case, data: st.DataObject, seed: int, batch: int, factor: float
) -> None:
    case.start(seed, factor)
    size = data.draw(sizes(case))
    inputs = case.toy.inputs(batch, size, seed)
    sets = data.draw(nested_sets(case.stages, size, batch))
    gather, removed = run(case, inputs, "gather", sets)
    mask, masked = run(case, inputs, "mask", sets)
    assert difference(tensors(mask), tensors(gather)) < case.bound
    last = sets[-1].sort(dim=1).values.unsqueeze(-1).expand_as(removed.patch_tokens)
    rows = masked.patch_tokens.gather(1, last)
    assert difference([rows], [removed.patch_tokens]) < case.bound
    for stage, kept in enumerate(sets):
        assert torch.equal(removed.stages[stage].keep_indices, kept.sort(dim=1).values)
        assert torch.equal(masked.stages[stage].decision, removed.stages[stage].decision)


@fewer
@given(data=st.data(), seed=SEED)
def test_2_the_mask_path_of_training_is_the_gather_path_of_eval(
    case: Case, data: st.DataObject, seed: int
) -> None:
    if case.toy.noisy:
        return
    case.start(seed)
    inputs = case.toy.inputs(3, seed=seed)
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], 3))
    case.model.eval()
    gather, _ = run(case, inputs, "gather", sets)
    case.model.train()
    mask, _ = run(case, inputs, "mask", sets)
    assert difference(tensors(mask), tensors(gather)) < case.bound


@few
@given(data=st.data(), seed=SEED, batch=BATCH)
def test_3_the_contents_of_dropped_tokens_do_not_matter(
    case: Case, data: st.DataObject, seed: int, batch: int
) -> None:
    if case.toy.blocks[0] != 0:
        return  # blocks before the first stage see every token
    case.start(seed, FACTORS[seed % 2])
    garbage = data.draw(case.garbage)
    inputs = case.toy.inputs(batch, seed=seed)
    side = case.toy.sizes[0] // PATCH
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], batch))
    kept = torch.zeros(batch, side * side, dtype=torch.bool).scatter(1, sets[0], True)
    pixels = kept.view(batch, 1, side, side)
    pixels = pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    other = {**inputs, "x": torch.where(pixels, inputs["x"], garbage)}
    for path in ("mask", "gather"):
        plain, _ = run(case, inputs, path, sets)
        assert difference(tensors(run(case, other, path, sets)[0]), tensors(plain)) < case.bound


@few
@given(data=st.data(), seed=SEED)
def test_4_an_image_does_not_depend_on_the_others(
    case: Case, data: st.DataObject, seed: int
) -> None:
    case.start(seed)
    garbage = data.draw(case.garbage)
    inputs = case.toy.inputs(3, seed=seed)
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], 3))
    first = [kept[:1] for kept in sets]
    alone = {name: value[:1] for name, value in inputs.items()}
    others = torch.arange(3).view(3, 1, 1, 1) > 0
    spoilt = {**inputs, "x": inputs["x"].masked_fill(others, garbage)}
    for path in ("gather", "mask"):
        together = [t[:1] for t in tensors(run(case, inputs, path, sets)[0])]
        beside = [t[:1] for t in tensors(run(case, spoilt, path, sets)[0])]
        assert difference(beside, together) < case.bound
        if case.toy.images_alone:
            single = tensors(run(case, alone, path, first)[0])
            assert difference(single, together) < case.bound


@few
@given(data=st.data(), seed=SEED, batch=BATCH)
def test_5_kept_sets_are_nested_sorted_and_counted(
    case: Case, data: st.DataObject, seed: int, batch: int
) -> None:
    case.start(seed)
    size = data.draw(sizes(case))
    inputs, total = case.toy.inputs(batch, size, seed), patches(size)
    ratio = st.floats(1e-3, 1.0) | st.sampled_from([1e-3, 1 / total, 1.0])
    ratios = sorted((data.draw(ratio) for _ in range(case.stages)), reverse=True)
    case.model.set_keep_ratio(ratios)
    _, removed = run(case, inputs, "gather")
    _, masked = run(case, inputs, "mask")
    before: set[int] = set(range(total))
    for image in range(batch):
        before = set(range(total))
        for stage, wanted in zip(removed.stages, ratios, strict=True):
            kept = stage.keep_indices[image].tolist()
            assert kept == sorted(set(kept))
            assert set(kept) <= before
            assert len(kept) == stage.num_tokens == num_keep(total, wanted)
            assert 1 <= len(kept) <= total
            assert stage.decision[image].nonzero().flatten().tolist() == kept
            before = set(kept)
    for stage, wanted in zip(masked.stages, ratios, strict=True):
        assert set(stage.decision.unique().tolist()) <= {0.0, 1.0}
        assert stage.decision.sum(1).tolist() == [num_keep(total, wanted)] * batch
    assert (masked.stages[1].decision <= masked.stages[0].decision).all()
    # the first stage sees the same tokens on both paths, so it must choose the same
    assert torch.equal(masked.stages[0].decision, removed.stages[0].decision)


@few
@given(seed=SEED, batch=BATCH)
def test_5_sampled_decisions_are_nested(case: Case, seed: int, batch: int) -> None:
    case.start(seed)
    case.model.train()
    with torch.no_grad(), case.model.using(generator=torch.Generator().manual_seed(seed)):
        _, trace = case.model(**case.toy.inputs(batch, seed=seed), return_trace=True)
    first, second = (stage.decision for stage in trace.stages)
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    assert (second <= first).all()


def lean(model: Any, stages: Sequence[int], amount: float) -> None:
    """Make the predictors of some stages sure: a positive amount keeps every token."""
    with torch.no_grad():
        for stage in stages:
            getattr(model, PREDICTORS)[stage].out_proj[-1].bias.copy_(
                torch.tensor([amount, -amount])
            )


def step(case: Case, inputs: dict[str, Tensor], seed: int) -> tuple[list[Tensor], Any]:
    """A training step's outputs and trace; gradients are left in the parameters."""
    case.model.train()
    case.model.zero_grad()
    with case.model.using(generator=torch.Generator().manual_seed(seed)):
        output, trace = case.model(**inputs, return_trace=True)
    found = tensors(output)
    loss = sum(t.float().square().mean() for t in found)
    loss = loss + sum(stage.decision.float().mean() for stage in trace.stages)
    loss.backward()  # type: ignore[union-attr]
    return found, trace


def assert_finite(case: Case, output: list[Tensor]) -> None:
    assert all(torch.isfinite(t).all() for t in output)
    for name, parameter in case.model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    for name, parameter in getattr(case.model, PREDICTORS).named_parameters():
        assert parameter.grad is not None, name


# Of the decisions of both stages: all dropped, all kept, and kept by the first only.
DECISIONS = {"random": (0.0, 0.0), "none": (-1e4, -1e4), "all": (1e4, 1e4), "first": (1e4, -1e4)}


@fewer
@given(seed=SEED, decisions=st.sampled_from(list(DECISIONS)), factor=st.sampled_from(FACTORS))
def test_6_nothing_is_nan_for_any_decision(
    case: Case, seed: int, decisions: str, factor: float
) -> None:
    case.start(seed, factor)
    for stage, amount in enumerate(DECISIONS[decisions]):
        lean(case.model, [stage], amount)
    output, trace = step(case, case.toy.inputs(2, seed=seed), seed)
    if decisions == "none":
        assert all(stage.decision.sum() == 0 for stage in trace.stages)
    if decisions == "all":
        assert all(stage.decision.min() == 1 for stage in trace.stages)
    assert_finite(case, output)


LOW = ("eager", "rope_by_length", "mean_and_max")
LOW_PRECISION = pytest.mark.parametrize(
    "case", [TOYS[name] for name in LOW], indirect=True, ids=LOW
)


@LOW_PRECISION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_6_nothing_is_nan_under_autocast(case: Case, dtype: torch.dtype) -> None:
    for seed, decisions in enumerate(DECISIONS.values()):
        case.start(seed, FACTORS[seed % 2])
        for stage, amount in enumerate(decisions):
            lean(case.model, [stage], amount)
        with torch.autocast("cpu", dtype=dtype):
            output, _ = step(case, case.toy.inputs(2, seed=seed), seed)
        assert_finite(case, output)


@fewer
@given(seed=SEED)
def test_7_every_predictor_parameter_learns(case: Case, seed: int) -> None:
    case.start(seed)
    step(case, case.toy.inputs(3, seed=seed), seed)
    for name, parameter in getattr(case.model, PREDICTORS).named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@fewer
@given(seed=SEED)
def test_7_the_same_seed_gives_the_same_trace(case: Case, seed: int) -> None:
    case.start(seed)
    inputs = case.toy.inputs(3, seed=seed)
    state = torch.get_rng_state()
    traces = [step(case, inputs, s)[1] for s in (seed, seed, seed + 1)]
    if not case.toy.noisy:  # the noise of decisions comes from the generator alone
        assert torch.equal(torch.get_rng_state(), state)
    ours, again, other = (
        [t for stage in trace.stages for t in (stage.keep_logits, stage.decision)]
        for trace in traces
    )
    same = [torch.equal(a, b) for a, b in zip(ours, again, strict=True)]
    # dropout in the host draws from the global state, so later stages may differ there
    assert all(same[:2] if case.toy.noisy else same)
    assert not torch.equal(ours[1], other[1])


def test_8_state_dict_holds_the_hosts_keys_and_the_predictors(case: Case) -> None:
    case.start(0)
    state = case.model.state_dict()
    own = [key for key in state if key.startswith(f"{PREDICTORS}.")]
    assert [key for key in state if key not in own] == case.keys
    assert {key.split(".")[1] for key in own} == {str(s) for s in range(case.stages)}
    assert list(case.host.state_dict()) == case.keys
    names = [name for name, _ in case.model.named_parameters()]
    theirs = {name: id(p) for name, p in case.host.named_parameters()}
    assert {n: id(p) for n, p in case.model.named_parameters() if n in theirs} == theirs
    assert len(set(names)) == len(names) == len(theirs) + len(own)


def test_8_the_hosts_own_checkpoint_loads(case: Case) -> None:
    checkpoint = case.toy.build(seed=7).state_dict()
    predictors = getattr(case.model, PREDICTORS).state_dict()
    before = {key: value.clone() for key, value in predictors.items()}
    case.model.load_state_dict(checkpoint)
    for key, value in case.host.state_dict().items():
        assert torch.equal(value, checkpoint[key]), key
    after = getattr(case.model, PREDICTORS).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@torch.no_grad()
def test_8_pickled_state_and_copies_keep_outputs(case: Case) -> None:
    case.start(3)
    inputs = case.toy.inputs(2)
    expected = tensors(case.model(**inputs))

    twin = copy.deepcopy(case.model)
    assert same_bits(twin(**inputs), expected)
    for parameter in twin.parameters():
        parameter.zero_()
    assert same_bits(case.model(**inputs), expected)  # nothing is shared
    assert tokenprune.unwrap(twin) is not case.host
    assert tokenprune.unwrap(twin).head.weight is twin.head.weight

    twin.load_state_dict(pickle.loads(pickle.dumps(case.model.state_dict())))
    assert same_bits(twin(**inputs), expected)


COMPILE = """
import torch
from tests.properties.hosts import TOYS
toy = TOYS["rope_by_length"]
model, inputs = toy.wrap(verify=False), toy.inputs(2)
with torch.no_grad():
    expected = model(**inputs)  # the first call of a signature traces, which breaks a graph
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), expected)
model.train()
sets = [torch.arange(8).expand(2, -1), torch.arange(3).expand(2, -1)]
compiled = torch.compile(model, backend="eager")
with model.using(keep_indices=sets):
    out = compiled(**inputs)
    assert torch.equal(out, model(**inputs))
    out.sum().backward()
print("compiled")
"""


def test_8_compiled_models_keep_outputs() -> None:
    # In a process of its own: the shape checks of the test run would break the graphs.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "compiled", done.stderr


DOUBLE = (
    *(f"prefix_{p}" for p in range(10)),
    "eager",
    "rope",
    "relative_bias",
    "mean_and_max",
    "class_attention",
)
DOUBLE += ("bool_mask", "timm_vit", "timm_eva")


@pytest.mark.parametrize("name", DOUBLE)
def test_2_in_float64_with_weights_x50(name: str) -> None:
    toy = {**TOYS, **PREFIXES}[name]
    host = toy.build(0, 50.0).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in toy.inputs(3).items()}
    double = Case(toy, host, toy.wrap(host, example_inputs=inputs, verify=False), [])
    largest = 0.0

    @few
    @given(data=st.data(), seed=SEED)
    def agree(data: st.DataObject, seed: int) -> None:
        nonlocal largest
        double.start(seed, 50.0)
        sets = data.draw(nested_sets(2, toy.sizes[0], 3))
        gather, mask = (tensors(run(double, inputs, path, sets)[0]) for path in ("gather", "mask"))
        largest = max(largest, difference(mask, gather))

    agree()
    assert largest < 1e-9


@pytest.mark.parametrize(
    "gap",
    [
        pytest.param(toy, id=name, marks=pytest.mark.xfail(strict=True, reason=reason))
        for name, (toy, reason) in GAPS.items()
    ],
)
def test_known_gaps(gap: Toy) -> None:
    """What a host of `TOYS` can do. A toy that passes here belongs there."""
    host = gap.build()
    dense = tensors(gap.build()(**gap.inputs()))
    model = gap.wrap(host)
    tokenprune.verify(model, gap.inputs())
    for size in gap.sizes:
        model.train()
        sum(t.sum() for t in tensors(model(**gap.inputs(3, size)))).backward()  # type: ignore[union-attr]
        model.eval()
        model(**gap.inputs(3, size))
    assert same_bits(host(**gap.inputs()), dense)
