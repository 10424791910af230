"""Hosts put together by chance: wrapped and proven, or refused by an error of this library."""

import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.analysis.test_reading import IMAGES, WIDTH, Attention, Pairs, feed_forward
from tokenprune.errors import TokenPruneError, TokenPruneWarning

RESIDUALS = ("plain", "post-norm", "scaled", "gated", "parallel", "none")
BETWEEN = ("nothing", "sort", "grid", "branch", "item", "chunks", "halves")
ENDS = ("first", "mean", "max", "flat", "all")


class Generated(Pairs):
    """One host of the pieces that are named."""

    def __init__(self, pieces: list[tuple[str, str, str]], end: str) -> None:
        super().__init__(0)
        self.pieces, self.end = pieces, end
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in pieces)
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(kind), feed_forward()]) for kind, *_ in pieces
        )
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.gate = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for (_, residual, between), norm, (attend, feed) in zip(
            self.pieces, self.norms, self.layers, strict=True
        ):
            x = self._step(x, residual, norm, attend, feed)
            x = self._between(x, between)
        ends: dict[str, Any] = {
            "first": lambda: x[:, 0], "mean": lambda: x.mean(1), "max": lambda: x.amax(1),
            "flat": lambda: x.flatten(1)[:, :WIDTH], "all": lambda: x,
        }  # fmt: skip
        y: Tensor = self.head(ends[self.end]())
        return y

    def _step(self, x: Tensor, residual: str, norm: Any, attend: Any, feed: Any) -> Tensor:
        if residual == "post-norm":
            x = norm(x + attend(x))
            return x + feed(x)
        if residual == "parallel":
            return x + attend(norm(x)) + feed(x)
        if residual == "none":
            y: Tensor = feed(attend(norm(x)))
            return y
        gate = {"plain": 1.0, "scaled": self.gate.exp(), "gated": self.gate.sigmoid()}[residual]
        keep = 1 - self.gate.sigmoid() if residual == "gated" else 1.0
        x = keep * x + gate * attend(norm(x))
        return keep * x + gate * feed(x)

    def _between(self, x: Tensor, what: str) -> Tensor:
        if what == "sort":
            return x.sort(dim=1).values
        if what == "grid":
            grid = self.mix(x[:, 2:].transpose(1, 2).reshape(len(x), WIDTH, 4, 4))
            return torch.cat([x[:, :2], grid.flatten(2).transpose(1, 2)], dim=1)
        if what == "chunks":
            return torch.cat([part.relu() for part in x.chunk(3, dim=1)], dim=1)
        if what == "halves":
            first, second = x.split(9, dim=1)
            return torch.cat([first * 2, second], dim=1)
        if what == "branch" and x.shape[1] % 2:
            return x * 2
        return x * float(x[0, 0, 0].item()) if what == "item" else x


PIECE = st.tuples(
    st.sampled_from(("fused", "einsum")), st.sampled_from(RESIDUALS), st.sampled_from(BETWEEN)
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    pieces=st.lists(PIECE, min_size=2, max_size=3),
    end=st.sampled_from(ENDS),
    how=st.sampled_from((None, "merge-k0.7")),
)
def test_a_generated_host_is_proven_or_refused_by_name(
    pieces: list[tuple[str, str, str]], end: str, how: str | None
) -> None:
    host = Generated(pieces, end).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TokenPruneWarning)
        try:
            model = tokenprune.wrap(host, how, example_inputs=IMAGES, restore=True, train=False)
        except TokenPruneError:
            return
    model.set_keep_ratio(1.0)
    with torch.no_grad():  # with every token kept, and traced: the host itself
        kept, _ = model(IMAGES, return_trace=True)
        assert torch.equal(kept, host(IMAGES))
