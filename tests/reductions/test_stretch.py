"""Tokens that leave within a stretch of a hierarchical host and are put back at its end."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.zoo.hosts_grid import GRID
from tests.zoo.rows import Row, over, randomize_weights
from tokenprune.errors import PlanError
from tokenprune.ops.layout import Layout, flat_tokens, laid_out

WIDTH, SIDE, HEADS = 16, 6, 2
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
LAYOUTS = ("sequence", "last", "first")


class Mixer(nn.Module):
    """Attention and MLP on [B, L, D], [B, H, W, D] ("last") or [B, D, H, W] ("first")."""

    def __init__(self, layout: str, local: bool = False) -> None:
        super().__init__()
        self.layout = layout
        dense: Any = (lambda i, o: nn.Conv2d(i, o, 1)) if layout == "first" else nn.Linear
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = dense(WIDTH, 3 * WIDTH), dense(WIDTH, WIDTH)
        self.mlp = nn.Sequential(dense(WIDTH, 2 * WIDTH), nn.GELU(), dense(2 * WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.randn(HEADS, SIDE**2, SIDE**2))
        self.local = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) if local else None

    def normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        if self.layout != "first":
            return norm(x)  # type: ignore[no-any-return]
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        shape, first = x.shape, self.layout == "first"
        qkv = self.qkv(self.normed(x, self.norm1))
        qkv = qkv.flatten(2).transpose(1, 2) if first else qkv.flatten(1, -2)
        parts = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        attended = attended.transpose(1, 2).flatten(2)
        attended = attended.transpose(1, 2) if first else attended
        x = x + self.proj(attended.reshape(shape))
        if self.local is not None:
            x = x + self.local(x)
        return x + self.mlp(self.normed(x, self.norm2))


class Beside(Mixer):
    """Attention and MLP beside each other: the block has no middle."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x + self.mlp(self.normed(x, self.norm2))


class Pyramid(nn.Module):
    """Convolutions on 12 x 12 places, global attention on 6 x 6, and a convolution after it; what
    block 1 of 4 returns is read by a convolution beside the blocks too."""

    def __init__(self, layout: str, local: bool = False) -> None:
        super().__init__()
        self.layout = layout
        self.stem, self.near = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(Mixer(layout, local and i == 2) for i in range(4))
        self.side, self.merge = nn.Conv2d(WIDTH, 7, 3), nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.head = nn.Linear(WIDTH, 7)

    def grid(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.down(x + F.gelu(self.near(x)))  # type: ignore[no-any-return]

    def ends(self, middle: Tensor, last: Tensor) -> Tensor:
        """Of two grids [B, D, H, W]."""
        y: Tensor = self.head(self.merge(last).mean((2, 3))) + self.side(middle).mean((2, 3))
        return y

    def forward(self, x: Tensor) -> Tensor:
        x, grids = self.grid(x), list[Tensor]()
        if self.layout != "first":
            x = x.permute(0, 2, 3, 1)
            x = x.flatten(1, 2) if self.layout == "sequence" else x
        for block in self.blocks:
            x = block(x)
            y = x.unflatten(1, (SIDE, SIDE)) if self.layout == "sequence" else x
            grids.append(y if self.layout == "first" else y.permute(0, 3, 1, 2))
        return self.ends(grids[1], grids[3])


def block_of_tokens(block: Mixer, x: Tensor, kept: Tensor) -> Tensor:
    """What a block does with the tokens `kept` [B, K] of [B, L, D], each said by itself."""

    def dense(layer: Any, y: Tensor) -> Tensor:
        return y @ layer.weight.flatten(1).T + layer.bias

    batch, count = kept.shape
    q, k, v = dense(block.qkv, block.norm1(x)).reshape(batch, count, 3, HEADS, -1).unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
    bias = torch.stack([block.bias[:, rows][:, :, rows] for rows in kept])
    weights = (logits + bias).softmax(-1)
    x = x + dense(block.proj, torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    return x + dense(block.mlp[2], F.gelu(dense(block.mlp[0], block.norm2(x))))


def reference(
    host: Pyramid, image: Tensor, stages: Sequence[int], sets: Sequence[Tensor]
) -> Tensor:
    """The host where a token that a stage drops keeps the value with which it came to it."""
    full = host.grid(image).flatten(2).transpose(1, 2)
    kept, maps = torch.arange(SIDE**2).expand(len(image), -1), []
    for number, block in enumerate(host.blocks):
        if number in stages:
            kept = sets[list(stages).index(number)]
        index = kept[:, :, None].expand(-1, -1, WIDTH)
        full = full.scatter(1, index, block_of_tokens(block, full.gather(1, index), kept))
        maps.append(full.transpose(1, 2).unflatten(2, (SIDE, SIDE)))
    return host.ends(maps[1], maps[3])


def recipe(*blocks: int, **rest: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "mode": "remove",
        "schedule": {"blocks": blocks, "keep_ratio": 0.6},
    } | rest


@lru_cache(maxsize=len(LAYOUTS))
def pruned(layout: str) -> tuple[Pyramid, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = Pyramid(layout).double().eval()
        randomize_weights(host, 20.0)
    model = tokenprune.wrap(host, recipe(1, 3), example_inputs=IMAGES.double(), train=False)
    return host, model.eval()


class MeanOfTokens(Pyramid):
    """The mean is over what the last block returns, with nothing between them."""

    def forward(self, x: Tensor) -> Tensor:
        x, streams = self.grid(x).permute(0, 2, 3, 1).flatten(1, 2), list[Tensor]()
        for block in self.blocks:
            x = block(x)
            streams.append(x)
        middle = streams[1].unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
        return self.head(x.mean(1)) + self.side(middle).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["merge", "remove"])
def test_a_mean_behind_a_stretch_is_over_all_tokens(mode: str) -> None:
    stages = recipe(1, 3, mode=mode)
    model = tokenprune.wrap(MeanOfTokens("sequence"), stages, example_inputs=IMAGES)
    assert tokenprune.profile(model).ratio < 0.95


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_kept_sets_give_what_is_written_out(layout: str, data: st.DataObject) -> None:
    host, model = pruned(layout)
    counts = data.draw(st.tuples(st.integers(1, 36), st.integers(1, 36)).map(sorted))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    wide = torch.rand(2, 36).argsort(1)[:, : counts[1]]
    narrow = wide[:, : counts[0]]
    sets = [wide.sort(1).values, narrow.sort(1).values]
    image = IMAGES.double().requires_grad_()
    expected = reference(host, image, (1, 3), sets)
    (wanted,) = torch.autograd.grad(expected.square().sum(), image)
    for path in ("gather", "mask"):
        with model.using(path, keep_indices=sets):
            found = model(image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        (gradient,) = torch.autograd.grad(found.square().sum(), image)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_proof_holds_and_less_is_computed(layout: str) -> None:
    _, model = pruned(layout)
    certificate = tokenprune.verify(model, IMAGES.double())
    assert all(check.passed for check in certificate.checks), str(certificate)
    assert certificate.patches_per_stage == (36, 36)
    counted = tokenprune.profile(model)
    assert counted.tokens_per_block == (36, 21, 21, 12)
    assert counted.starts == (0,)
    blocks = list(zip(counted.macs_per_block, counted.dense_macs_per_block, strict=True))
    assert [pruned < dense for pruned, dense in blocks] == [False, True, True, True]
    with model.using("gather"):
        _, trace = model(IMAGES.double(), return_trace=True)
    assert trace.patch_tokens.shape == (2, 36, WIDTH)  # in place again


def test_where_nothing_left_the_tensor_itself_goes_on() -> None:
    grid = torch.randn(2, 4, 3, 5)
    flat = flat_tokens(grid, Layout(1, True))
    assert laid_out(flat, flat, grid, grid, Layout(1, True)) is grid
    assert torch.equal(laid_out(flat.clone(), flat, grid, grid, Layout(1, True)), grid)
    assert laid_out(flat[:, :7], flat, grid, grid, Layout(1, True)).shape == (2, 4, 1, 7)


def test_where_only_the_first_block_has_a_middle_stages_are_at_entries() -> None:
    host = Pyramid("sequence").eval()
    for number in (1, 2, 3):
        host.blocks[number] = Beside("sequence")
    options: dict[str, Any] = {"example_inputs": IMAGES, "train": False, "verify": False}
    model = tokenprune.wrap(host, "merge-k0.7", **options)
    assert tokenprune.profile(model).stages == (1, 2, 3)


def test_images_may_keep_different_numbers() -> None:
    host, _ = pruned("first")
    own = recipe(1, 3, sampling={"selection": "threshold", "threshold": 0.5})
    model = tokenprune.wrap(host, own, example_inputs=IMAGES.double(), train=False).eval()
    assert all(check.passed for check in tokenprune.verify(model, IMAGES.double()).checks)
    sets = [torch.arange(30).expand(2, -1).clone(), torch.arange(20).expand(2, -1).clone()]
    sets[1][0, 5:] = -1
    with model.using(keep_indices=sets):
        found = model(IMAGES.double())
    alone = [kept[:1, kept[0] >= 0] for kept in sets]
    expected = reference(host, IMAGES[:1].double(), (1, 3), alone)
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=1e-9)


def test_what_reads_neighbours_is_named_and_parts_stretches() -> None:
    host = Pyramid("first", local=True).eval()
    with pytest.raises(PlanError) as caught:
        tokenprune.wrap(host, recipe(1, 2), example_inputs=IMAGES, train=False)
    message = str(caught.value)
    for part in (
        "Block 2 ('blocks.2') has to keep all its tokens: Conv2d 'blocks.2.local' reads the",
        "x = x + self.local(x)",
        "Put stages at blocks 0 to 1 or 3 to 3, or use `mode: bypass`",
    ):
        assert part in message
    model = tokenprune.wrap(host, recipe(1, 3), example_inputs=IMAGES, train=False).eval()
    assert all(check.passed for check in tokenprune.verify(model, IMAGES).checks)
    first, second = torch.arange(20).expand(2, -1), torch.arange(10, 36).expand(2, -1)
    with model.using("gather", keep_indices=[first, second]):  # the second one need not be inside
        _, trace = model(IMAGES, return_trace=True)
    assert [stage.decision.sum().item() for stage in trace.stages] == [40, 52]
    assert trace.stages[1].keep_logits.isfinite().all()  # all tokens were there again


FOUND: dict[str, Any] = {
    "hiera": {"version": 1, "mode": "remove", "schedule": {"keep_ratio": 0.7}},
    "coatnet": "merge-k0.7",
    "convit": {"version": 1, "mode": "remove", "schedule": {"keep_ratio": 0.7}},
    "crossvit": "evit-k0.7",
    "nest": {"version": 1, "mode": "remove", "schedule": {"keep_ratio": 0.7}},
}


@over([row for row in GRID if row.name in FOUND])
def test_hosts_of_libraries_have_such_stretches(row: Row) -> None:
    host, asked = row.build(1.0), FOUND[row.name]
    model = tokenprune.wrap(host, asked, example_inputs=row.inputs(), train=False)
    assert all(check.passed for check in tokenprune.verify(model, row.inputs()).checks)
    prefix = {"convit": 1, "crossvit": 1}  # of ConViT it comes before the third block
    assert model._pruning.plan.num_prefix == prefix.get(row.name, 0)
