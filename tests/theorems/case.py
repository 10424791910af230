"""What the tests of the theorems share: a wrapped toy, how it runs, how outputs are compared."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.toys.table import Toy
from tests.toys.vit import PATCH, randomize_weights

__all__ = [
    "BATCH",
    "FACTORS",
    "SEED",
    "Case",
    "difference",
    "few",
    "fewer",
    "nested_sets",
    "no_fast_path",
    "patches",
    "run",
    "same_bits",
    "sizes",
    "step",
    "tensors",
]

# Largest difference that rounding may cause, relative to the scale of the output.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A random network with attention weights x50 amplifies the rounding of fp32 without limit, so its
# proof is in float64. The toys are small enough to hold 1e-4 in fp32 as well.
FACTORS = (1.0, 50.0)
RATIO = 0.6
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30, 3.0)

few = settings(max_examples=3)
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
            randomize_weights(self.model, factor)

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
    """Largest difference relative to the scale of `theirs`; NaN if one of them is.

    Equal infinities (logits of tokens that are gone) differ by nothing.
    """
    assert theirs
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        apart = torch.where(a == b, 0.0, a.double() - b.double()).abs().max()
        errors.append((apart / b[b.isfinite()].double().abs().max()).item())
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


@contextmanager
def no_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention has another kernel for eval, with other rounding, that no graph has."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
