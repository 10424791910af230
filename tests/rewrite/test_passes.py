"""Passes: what they put into a graph, what they leave out, and what they refuse by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tokenprune
from tokenprune.analysis.blocks import site_marker
from tokenprune.errors import LeakError, UnsupportedHostError
from tokenprune.ops.align import policy_of
from tokenprune.ops.attention import masked_attention
from tokenprune.ops.moving import gather_table
from tokenprune.rewrite.passes import Pass, run_passes
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.stages import decide, score, select_gathered

WIDTH, LENGTH = 8, 10
RECIPE = {"version": 1, "schedule": {"blocks": [0, 2], "keep_ratio": 0.6}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = (self.qkv(x) + table.repeat(1, 3)).chunk(3, dim=-1)
        unused = x.cumsum(dim=1)  # dead code: must not count as mixing
        del unused
        return x + F.scaled_dot_product_attention(q, k, v)


class Host(nn.Module):
    def __init__(self, end: Callable[["Host", Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block(), Block()])
        self.register_buffer("table", torch.randn(LENGTH, WIDTH))
        self.pool, self.norm = nn.AdaptiveAvgPool1d(2), nn.BatchNorm1d(WIDTH)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.table)
        return self.end(self, x)


def wrapped(end: Callable[[Host, Tensor], Tensor] = lambda host, x: x[:, 0], **options: Any) -> Any:
    torch.manual_seed(0)
    spec = tokenprune.ArchSpec(
        adapter="by hand", blocks=tuple(f"blocks.{i}" for i in range(4)), num_prefix_tokens=1
    )
    given = {"adapter": spec, "example_inputs": torch.randn(2, LENGTH, WIDTH)}
    left_out = {"verify": False, "train": False}
    return tokenprune.wrap(Host(end).eval(), RECIPE, **{**given, **left_out, **options})


def graph(path: Any, **options: Any) -> fx.Graph:
    model = wrapped(**options)
    programs, *_ = model._pruning.cache
    return programs.get(model, path).rewrite.graph


def count(found: fx.Graph, target: Any) -> int:
    return sum(node.target is target for node in found.nodes)


def test_the_mask_path_asks_each_predictor_once_and_masks_what_follows() -> None:
    found = graph("mask")
    assert count(found, score) == count(found, decide) == 2
    assert count(found, policy_of) == 2  # one for each stage, whatever number of blocks reads it
    assert count(found, masked_attention) == 4
    assert count(found, F.scaled_dot_product_attention) == 0
    assert count(found, select_gathered) == count(found, gather_table) == 0


def test_the_gather_path_gathers_each_table_once_for_each_stage() -> None:
    found = graph("gather")
    assert count(found, score) == count(found, select_gathered) == 2
    assert count(found, gather_table) == 2
    assert count(found, F.scaled_dot_product_attention) == 4
    assert count(found, decide) == count(found, masked_attention) == 0


@pytest.mark.parametrize("path", ["dense", "mask", "gather"])
def test_no_marker_and_no_dead_node_is_left(path: str) -> None:
    found = graph(path)
    found.lint()
    assert count(found, site_marker) == 0
    assert not [node for node in found.nodes if "cumsum" in str(node.target)]
    (output,) = (node for node in found.nodes if node.op == "output")
    host_output, records, tokens, *_ = output.args[0]
    assert isinstance(host_output, fx.Node)
    assert isinstance(tokens, fx.Node)
    assert len(records) == (0 if path == "dense" else 2)


def test_the_traced_graph_itself_never_changes() -> None:
    model = wrapped()
    programs, *_ = model._pruning.cache
    before = str(programs.analysis.traced.graph)
    for path in ("dense", "mask", "gather"):
        programs.get(model, path)
    assert str(programs.analysis.traced.graph) == before
    assert programs.get(model, "mask") is programs.get(model, "mask")


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (
            lambda host, x: x.mean(dim=(1, 2)),
            r"'mean' .* reduces dims \[1, 2\] at once",
        ),
        (lambda host, x: x.sum()[None], r"'sum_1' .* reduces dims \[0, 1, 2\] at once"),
        (
            lambda host, x: host.pool(x.transpose(1, 2)).flatten(1),
            r"'pool' .* pools tokens into 2 bins; only 1 can be masked",
        ),
        (lambda host, x: x.transpose(0, 1).amax(0), "first dim is not the batch"),
    ],
    ids=["two dims", "all dims", "bins", "tokens first"],
)
def test_a_mixing_that_no_rule_can_mask_is_named(end: Any, says: str) -> None:
    model = wrapped(end)
    with pytest.raises(LeakError, match=says):
        model.train()(torch.randn(2, LENGTH, WIDTH))
    with torch.no_grad():  # the host itself still runs
        assert tokenprune.unwrap(model)(torch.randn(2, LENGTH, WIDTH)).isfinite().all()


def test_a_reduction_in_another_type_stays_in_it() -> None:
    model = wrapped(lambda host, x: x.mean(dim=1, dtype=torch.float64))
    x = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad(), model.using(path="mask"):
        masked = model(x)
    with torch.no_grad():
        gathered = model(x)
    assert masked.dtype == gathered.dtype == torch.float64
    torch.testing.assert_close(masked, gathered, rtol=0, atol=1e-5)


def test_batch_statistics_over_dropped_tokens_are_refused_in_training_only() -> None:
    model = wrapped(lambda host, x: host.norm(x.transpose(1, 2))[..., 0])
    x = torch.randn(2, LENGTH, WIDTH)
    with pytest.raises(LeakError, match=r"'norm' .* batch statistics over dropped tokens.*eval"):
        model.train()(x)
    model.norm.eval()
    assert model(x).shape == (2, WIDTH)


class Fails(Pass):
    def __init__(self, at: str, error: Exception) -> None:
        self.at, self.error = at, error

    def requires(self, rewrite: Rewrite) -> None:
        if self.at == "requires":
            raise self.error

    def apply(self, rewrite: Rewrite) -> None:
        if self.at == "apply":
            raise self.error

    def ensures(self, rewrite: Rewrite) -> None:
        if self.at == "ensures":
            raise self.error


@pytest.mark.parametrize(
    ("at", "error", "kind", "says"),
    [
        ("apply", KeyError("node"), UnsupportedHostError, "Fails failed on this host: KeyError"),
        ("apply", RuntimeError("odd"), UnsupportedHostError, "RuntimeError: odd"),
        ("apply", LeakError("this leaks"), LeakError, "^this leaks$"),
        ("requires", UnsupportedHostError("not this"), UnsupportedHostError, "^not this$"),
        ("ensures", RuntimeError("a bug"), RuntimeError, "^a bug$"),
    ],
)
def test_a_pass_that_fails_is_named(
    at: str, error: Exception, kind: type[Exception], says: str
) -> None:
    model = wrapped()
    programs, *_ = model._pruning.cache
    rewrite = Rewrite(model, programs.analysis)
    with pytest.raises(kind, match=says):
        run_passes(rewrite, [Fails(at, error)])
