"""Facts: which dims count tokens, what is aligned with them, and what no rule can shorten."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tokenprune.analysis.analysis import Analysis
from tokenprune.analysis.batch_probe import probe_batch
from tokenprune.analysis.facts import NodeFacts, TokenDim
from tokenprune.analysis.token_run import EXTRA, TokenRun
from tokenprune.errors import PlanError, UnsupportedHostError

WIDTH, PATCHES, PREFIX = 8, 9, 1
RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
Step = Callable[["Host", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step(x)


class Host(nn.Module):
    """Three blocks per token, and one step after the second stage that a test chooses."""

    def __init__(self, step: Step, between: Step | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.step, self.between = step, between
        self.register_buffer("table", torch.randn(PREFIX + PATCHES, WIDTH))
        self.register_buffer("square", torch.randn(2, PREFIX + PATCHES, PREFIX + PATCHES))
        self.register_buffer("rows", torch.randn(PATCHES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        if self.between is not None:
            x = self.between(self, x)
        return self.step(self, self.blocks[2](x))[:, 0]


def wrapped(step: Step, between: Step | None = None) -> Any:
    spec = tokenprune.ArchSpec(
        adapter="by hand",
        blocks=("blocks.0", "blocks.1", "blocks.2"),
        num_prefix_tokens=PREFIX,
    )
    example = torch.randn(2, PREFIX + PATCHES, WIDTH)
    host = Host(step, between).eval()
    return tokenprune.wrap(
        host, RECIPE, adapter=spec, example_inputs=example, verify=False, train=False
    )


def probed(step: Step, between: Step | None = None) -> tuple[Analysis, dict[str, NodeFacts]]:
    """The analysis of a host, and what is known about its nodes, by name."""
    programs, *_ = wrapped(step, between)._pruning.cache
    return programs.analysis, {node.name: f for node, f in programs.analysis.facts.items()}


def test_sizes_that_say_which_stage_they_follow() -> None:
    sums = [a + b for a in EXTRA for b in EXTRA] + [a * b for a in EXTRA for b in EXTRA]
    assert len(set(EXTRA)) == len(EXTRA) > 12
    assert not set(EXTRA) & set(sums)


def test_dims_follow_the_latest_stage_through_any_operation() -> None:
    def step(host: Host, x: Tensor) -> Tensor:
        y = x.transpose(1, 2).contiguous()
        return (y @ x).softmax(-1) @ y[:, :, :1].expand(-1, -1, 5)

    analysis, facts = probed(step)
    assert facts["blocks_1_step"].dims == {1: TokenDim(0, PREFIX)}
    assert facts["blocks_2_step"].dims == {1: TokenDim(1, PREFIX)}
    assert facts["contiguous"].dims == {2: TokenDim(1, PREFIX)}
    assert not facts["matmul"].dims  # channels by channels
    assert not facts["blocks_0_step"].dims  # no stage yet
    assert facts["blocks_2_step"].rows_per_image == facts["matmul"].rows_per_image == 1
    assert not analysis.batch_bound


def test_patches_without_the_prefix_count_from_zero() -> None:
    _, facts = probed(lambda host, x: x[:, PREFIX:] * 2 + x[:, :1])
    assert facts["mul"].dims == {1: TokenDim(1, 0)}


def test_dims_that_count_tokens_times_something_are_folded() -> None:
    _, facts = probed(lambda host, x: x.reshape(-1, WIDTH).tanh().reshape(x.shape))
    assert facts["tanh"].folded
    assert not facts["tanh"].dims
    assert facts["reshape_1"].dims == {1: TokenDim(1, PREFIX)}


@pytest.mark.parametrize(
    ("step", "consumer", "table", "dims", "rank"),
    [
        (lambda host, x: x + host.table, "add_3", "table", {0: TokenDim(1, PREFIX)}, 3),
        (
            lambda host, x: x[:, PREFIX:] * host.rows + x[:, :1],
            "mul",
            "rows",
            {0: TokenDim(1, 0)},
            3,
        ),
        (
            lambda host, x: F.scaled_dot_product_attention(
                x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), attn_mask=host.square
            )[:, 0],
            "scaled_dot_product_attention",
            "square",
            {1: TokenDim(1, PREFIX), 2: TokenDim(1, PREFIX)},
            4,
        ),
    ],
    ids=["table", "rows without a prefix", "bias on both dims"],
)
def test_tables_made_for_all_tokens_are_aligned(
    step: Step, consumer: str, table: str, dims: dict[int, TokenDim], rank: int
) -> None:
    _, facts = probed(step)
    ((source, aligned),) = facts[consumer].gathers.items()
    assert source.name == table
    assert dict(aligned.dims) == dims
    assert aligned.rank == rank
    assert [name for name, known in facts.items() if known.gathers] == [consumer]


def test_a_table_of_the_size_of_the_tokens_is_made_whole() -> None:
    _, facts = probed(lambda host, x: x * torch.arange(x.shape[1])[None, :, None])
    assert facts["arange"].whole_table
    assert any(name.startswith("getitem") and f.follows_tokens for name, f in facts.items())


def test_a_decision_by_the_batch_binds_the_trace_to_it() -> None:
    analysis, _ = probed(lambda host, x: x * 2 if x.shape[0] == 2 else x)
    assert analysis.batch_bound
    analysis, _ = probed(lambda host, x: x * 2 if x.shape[2] == WIDTH else x)
    assert not analysis.batch_bound


@pytest.mark.parametrize(
    ("step", "between", "error", "says"),
    [
        (
            lambda host, x: x.reshape(x.shape[0], 2, 5, WIDTH).flatten(1, 2),
            None,
            UnsupportedHostError,
            r"cannot run with fewer tokens after stage 1: .*reshape.*test_token_probe.*It said: ",
        ),
        (
            lambda host, x: torch.cat([x, x[..., :2]], 2).reshape(len(x), 2, 5, -1).flatten(1, 2),
            None,
            UnsupportedHostError,
            r"lays 10 tokens out on a grid: .*reshape.*test_token_probe.*channels for places",
        ),
        (
            lambda host, x: x,
            lambda host, x: x[:, ::2],
            PlanError,
            r"Stage 1 \(block 2\) sees tokens of shape \(5, 8\), stage 0 \(block 1\) of \(10, 8\)",
        ),
    ],
    ids=[
        "a grid written out",
        "a grid, and as many channels as tokens",
        "tokens pooled in between",
    ],
)
def test_what_cannot_run_with_fewer_tokens_is_named(
    step: Step, between: Step | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        wrapped(step, between)


def test_a_second_run_of_the_probe_keeps_nothing_of_the_first() -> None:
    """A host that splits its tokens by the length of a table: its run is made again."""

    def step(host: Host, x: Tensor) -> Tensor:
        length = host.table.shape[0] - PREFIX  # follows the tokens, which a first run finds out
        spare = torch.ones(length + PREFIX)  # in that run a size of its own
        first, rest = x.split([x.shape[1] - length, length], dim=1)
        return torch.cat([first, rest * 2], dim=1) + spare[None, :, None]

    pruning = wrapped(step)._pruning
    programs, *_ = pruning.cache
    analysis, traced = programs.analysis, programs.analysis.traced
    lengths = {n: dict(f.length_of) for n, f in analysis.facts.items() if f.length_of}
    assert lengths
    markers = {marker: stage for stage, marker in enumerate(analysis.markers)}
    with torch.no_grad(), traced.fake_mode:
        facts, _ = probe_batch(pruning.host, traced)
        once = TokenRun(
            pruning.host, traced, markers, analysis.grids, PREFIX, (), (), lengths, dict(facts)
        )
        assert once.finishes()
    assert once.facts == dict(analysis.facts)
