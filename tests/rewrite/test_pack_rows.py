"""Packing: what gets a packed twin, and what reads padded tokens."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.toys.table import TOYS
from tests.toys.vit import randomize_weights
from tokenprune.ops import jagged, varlen
from tokenprune.ops.softmax import masked_softmax
from tokenprune.rewrite.pack_rows import PackRows
from tokenprune.rewrite.passes import run_passes
from tokenprune.rewrite.rewrite import Rewrite

BATCH, LENGTH, WIDTH = 4, 11, 8
RECIPE = {
    "version": 1,
    "schedule": {"blocks": [0, 2], "keep_ratio": 0.6},
    "sampling": {"selection": "threshold"},
}


class Block(nn.Module):
    """An attention whose sizes come from wherever `sizes` looks."""

    def __init__(self, sizes: Callable[[Tensor, Tensor], tuple[int, int]]) -> None:
        super().__init__()
        self.sizes, self.qkv, self.mlp = sizes, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        batch, length = self.sizes(x, images)
        q, k, v = self.qkv(x).view(batch, length, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, -1, WIDTH)
        return x + self.mlp(x)


class Host(nn.Module):
    def __init__(self, sizes: Callable[[Tensor, Tensor], tuple[int, int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        images = x
        for block in self.blocks:
            x = block(x, images)
        return x[:, 0]


def wrapped(host: nn.Module) -> Any:
    spec = tokenprune.ArchSpec(
        adapter="by hand", blocks=tuple(f"blocks.{i}" for i in range(4)), num_prefix_tokens=1
    )
    example = torch.randn(BATCH, LENGTH, WIDTH)
    model = tokenprune.wrap(
        host.eval(), RECIPE, adapter=spec, example_inputs=example, verify=False, train=False
    )
    randomize_weights(model, 3.0)
    return model.eval()


def targets(model: Any) -> Counter[Any]:
    """What the packed graph calls."""
    programs = next(iter(model._pruning.cache))
    rewrite = Rewrite(model, programs.analysis)
    passes = programs.reduction.passes("jagged", programs.scorer, programs.restore)
    return Counter(n.target for n in run_passes(rewrite, [*passes, PackRows()]).nodes)


@torch.no_grad()
def assert_right(model: Any, **inputs: Tensor) -> None:
    """The output is that of the mask path, with images that keep different numbers of tokens."""
    with model.using("mask"):
        _, trace = model(**inputs, return_trace=True)
        model.set_threshold(float(trace.stages[0].keep_logits[..., 0].exp().median()))
        expected = model(**inputs)
    output, trace = model(**inputs, return_trace=True)
    assert len(set(trace.stages[0].decision.sum(1).tolist())) > 1
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        lambda x, images: x.shape[:2],
        lambda x, images: (x.size(0), -1),
        lambda x, images: (images.shape[0], x.shape[1]),
        lambda x, images: (images.size(0) * 2 // 2, x.numel() // (images.size(0) * WIDTH)),
    ],
)
def test_sizes_are_those_of_packed_tokens(sizes: Any) -> None:
    torch.manual_seed(0)
    model = wrapped(Host(sizes))
    found = targets(model)
    assert found[varlen.packed_attention] == 4
    assert not any(found[target] for target in (varlen.pack, jagged.padded_attention))
    assert found[varlen.unpack] == 2  # for the scores of the second stage, and for the head
    assert_right(model, x=torch.randn(BATCH, LENGTH, WIDTH))


def test_what_has_no_twin_reads_padded_tokens() -> None:
    toy = TOYS["relative_bias"]
    model = tokenprune.wrap(
        toy.build(), {**toy.recipe, "sampling": RECIPE["sampling"]}, adapter=toy.facts,
        example_inputs=toy.inputs(), verify=False, train=False,
    ).eval()  # fmt: skip
    found = targets(model)
    assert found[masked_softmax]  # with a bias an image
    assert not found[varlen.packed_attention]
    assert found[varlen.pack]


class Writes(Block):
    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        whole = x + 1
        first = whole[:, :1]
        first.mul_(2)  # `whole` holds it too
        return super().forward(whole, images)


def test_where_a_forward_writes_in_place_nothing_is_packed() -> None:
    torch.manual_seed(0)
    host = Host(lambda x, images: x.shape[:2])
    host.blocks[1] = Writes(host.blocks[1].sizes)
    model = wrapped(host)
    assert not any(target in targets(model) for target in (varlen.lengths_of, varlen.pack))
    assert_right(model, x=torch.randn(BATCH, LENGTH, WIDTH))
