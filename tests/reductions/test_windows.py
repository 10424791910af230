"""Mode `windows`: how grids are cut up, and that whole windows leave blocks and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenprune
from tests.toys.vit import randomize_weights
from tokenprune.analysis.cuts import cut_of
from tokenprune.errors import PlanError
from tokenprune.ops.layout import Layout
from tokenprune.ops.windows import (
    Windows,
    leave_windows,
    put_windows,
    take_windows,
    to_windows,
    window_means,
    window_policy,
    window_rows,
)

GRID, SIZE, SHIFT, SIDE = 18, 4, 2, 5  # 18 x 18 tokens: padded to 20 x 20, 5 x 5 windows
SWIN = {"img_size": 72, "patch_size": 4, "embed_dim": 16, "window_size": SIZE, "num_classes": 5}
SAM = {"img_size": 112, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
HF = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2], "num_heads": [2]}
SCHEDULE = {"version": 1, "mode": "windows", "schedule": {"keep_ratio": 0.5}}
AT_BLOCK_0 = {"stages": [{"block": 0, "keep_ratio": 0.5}]}
RECIPE = {"version": 1, "mode": "windows", "scorer": "token-norm", **AT_BLOCK_0}


def swin(*depths: int) -> nn.Module:
    torch.manual_seed(0)
    family = timm.models.swin_transformer.SwinTransformer
    return family(**SWIN, depths=depths, num_heads=(2,) * len(depths)).eval()


def swin_v2() -> nn.Module:
    family = timm.models.swin_transformer_v2.SwinTransformerV2
    return family(**{**SWIN, "img_size": 32}, depths=(2,), num_heads=(2,))


def sam() -> nn.Module:
    family = timm.models.vision_transformer_sam.VisionTransformerSAM
    return family(**SAM, window_size=3, use_rel_pos=True, neck_chans=8, num_classes=3)


def of_transformers(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**HF, window_size=4)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@st.composite
def cuts(draw: st.DrawFn) -> Windows:
    size = draw(st.tuples(st.integers(1, 4), st.integers(2, 4)))
    across = draw(st.tuples(st.integers(1, 3), st.integers(2, 3)))
    spare = [draw(st.integers(0, side - 1)) for side in size]
    grid = (across[0] * size[0] - spare[0], across[1] * size[1] - spare[1])
    shift = draw(st.tuples(st.integers(0, grid[0] - 1), st.integers(0, grid[1] - 1)))
    padding = (0, spare[0], 0, spare[1])
    return Windows(grid, padding, shift, draw(st.booleans()), size, draw(st.booleans()))


@settings(max_examples=60)
@given(cuts(), st.integers(0, 2**16))
def test_a_cut_is_read_off_where_tokens_went(windows: Windows, seed: int) -> None:
    numbers, length = windows.tokens(), windows.grid[0] * windows.grid[1]
    assert numbers[numbers >= 0].sort().values.equal(torch.arange(length))
    found = cut_of(numbers + 1, length, [windows.grid])
    assert found is not None
    assert found.tokens().equal(numbers)
    torch.manual_seed(seed)
    shuffled = numbers.flatten()[torch.randperm(numbers.numel())].reshape_as(numbers)
    found = cut_of(shuffled + 1, length, [windows.grid])
    assert found is None or found.tokens().equal(shuffled)


@settings(max_examples=40)
@given(cuts(), st.integers(0, 2**16), st.booleans())
def test_windows_leave_and_come_back(windows: Windows, seed: int, channels_first: bool) -> None:
    torch.manual_seed(seed)
    batch, (height, width), count = 2, windows.grid, windows.number
    layout = Layout(channels_first=channels_first)
    shape = (batch, 3, height, width) if channels_first else (batch, height, width, 3)
    x, keep = torch.randn(shape), int(torch.randint(1, count + 1, ()))
    kept = torch.rand(batch, count).argsort(1)[:, :keep].sort(1).values
    flat = x.flatten(2).mT if channels_first else x.flatten(1, 2)
    numbers = windows.tokens()[kept]  # [B, K, M]
    rows = window_rows(kept, windows)
    assert (rows is None) == (keep == count)
    taken = take_windows(x, rows, windows, layout)
    cut = to_windows(taken, rows, windows, layout, (windows.places, 3), False)
    for image in range(batch):
        held = flat[image][numbers[image].clamp_min(0)]
        held = held.where(numbers[image].unsqueeze(-1) >= 0, 0.0)
        assert cut.reshape(batch, keep, windows.places, 3)[image].equal(held)
    new = leave_windows(cut + 1, rows, windows, False, layout, tuple(shape[1:]))
    policy = torch.zeros(batch, count).scatter(1, kept, 1.0)
    spread = window_policy(policy, windows)
    inside = (
        spread.reshape(batch, 1, height, width)
        if channels_first
        else spread.reshape(batch, height, width, 1)
    )
    assert put_windows(x, new, rows, windows, layout, layout, tuple(shape[1:])).equal(
        torch.where(inside > 0, x + 1, x)
    )
    means = window_means(spread.unsqueeze(-1), windows).squeeze(-1)
    torch.testing.assert_close(means, policy)


def windows_at(shift: int) -> Tensor:
    """The window of each token of the host's grid, told by its row and column alone."""
    place = torch.arange(GRID).sub(shift) % GRID // SIZE
    return (place[:, None] * SIDE + place).flatten()


@pytest.fixture(scope="module", params=[0, 1], ids=["plain", "shifted"])
def staged(request: pytest.FixtureRequest) -> tuple[int, nn.Module]:
    """A host of two blocks, pruned from one of them on: the second one's windows are shifted."""
    stages = {"stages": [{"block": request.param, "keep_ratio": 0.5}]}
    model = swin(2).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        randomize_weights(model, 3.0)
    recipe = {"version": 1, "mode": "windows", "scorer": "token-norm", **stages}
    return request.param, tokenprune.wrap(model, recipe, train=False, verify=False)


def through(model: nn.Module, block: int, call: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """What enters and what leaves a block in a call, [B, N, D] each."""
    seen: list[Tensor] = []

    def see(module: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        seen.extend(tokens.detach().flatten(1, 2).clone() for tokens in (given[0], made))

    handle = model.layers[0].blocks[block].register_forward_hook(see)
    try:
        with torch.no_grad():
            call()
    finally:
        handle.remove()
    return seen[0], seen[1]


@settings(max_examples=6)
@given(st.integers(0, 2**16), st.integers(1, SIDE**2 - 1))
def test_kept_windows_are_as_in_the_dense_host_and_the_others_stay(
    staged: tuple[int, nn.Module], seed: int, wanted: int
) -> None:
    block, model = staged
    torch.manual_seed(seed)
    x, batch = torch.randn(2, 3, 72, 72).double(), 2
    window = windows_at(SHIFT if block else 0)
    asked = torch.randperm(SIDE**2)[:wanted]
    forced = torch.isin(window, asked).nonzero().flatten().expand(batch, -1)
    if forced.shape[1] == GRID**2:
        return
    count = -(-forced.shape[1] * SIDE**2 // GRID**2)
    found = {}
    for path in ("gather", "mask"):
        with model.using(path, keep_indices=[forced]):
            found[path] = through(model, block, lambda: model(x))
    with model.using("dense"):
        given, dense = through(model, block, lambda: model(x))
    torch.testing.assert_close(found["gather"][1], found["mask"][1], rtol=1e-9, atol=1e-9)
    for image in range(batch):
        entered, left = (tokens[image] for tokens in found["gather"])
        assert entered.equal(given[image])
        changed = (left != entered).any(1)
        kept = window[changed].unique()
        assert len(kept) == count
        assert torch.isin(asked, kept).all() or len(asked) > count
        whole = torch.isin(window, kept)
        assert whole.equal(changed)
        torch.testing.assert_close(left[whole], dense[image][whole], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("build", "size", "blocks"),
    [
        (swin_v2, 32, {0, 1}),  # the norm of a branch comes after it
        (lambda: of_transformers("Swin"), 32, {0, 1}),
        (lambda: of_transformers("Swinv2"), 32, {0, 1}),
        (sam, 112, {0, 1}),  # padded windows, positions of queries and keys
    ],
    ids=["swin_v2", "hf_swin", "hf_swinv2", "sam"],
)
def test_hosts_are_proven(build: Callable[[], nn.Module], size: int, blocks: set[int]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    example = torch.randn(2, 3, size, size)
    wrapped = tokenprune.wrap(model, RECIPE, example_inputs=example, train=False)
    programs = wrapped._pruning.programs(wrapped._pruning.as_wrapped())
    assert set(programs.reduction.found) == blocks
    dense = tokenprune.profile(wrapped).dense_macs_per_block
    for block, macs in enumerate(tokenprune.profile(wrapped).macs_per_block):
        assert macs < 0.9 * dense[block]  # Swinv2 makes its biases by a network


def test_each_grid_has_a_stage_and_predictors_learn() -> None:
    model = tokenprune.wrap(swin(2, 1, 1), {**SCHEDULE, "scorer": "learned"})
    found = tokenprune.verify(model)  # gradients too
    assert "decisions without a gradient" in str(found)
    profile = tokenprune.profile(model)
    assert profile.stages == (1, 2, 3)  # what enters block 0 has not been looked at
    assert profile.tokens_per_block == (18 * 18, 13 * 16, 5 * 16, 2 * 16 - 7)
    images = torch.randn(3, 3, 72, 72)
    _, trace = model.eval()(images, return_trace=True)
    for stage in trace.stages:
        kept = [numbers[numbers >= 0] for numbers in stage.keep_indices]
        assert [len(k) for k in kept] == stage.decision.sum(1).tolist()
    with pytest.raises(PlanError, match=r"`mode: windows` every image keeps the same number"):
        model.set_threshold(0.5)


def test_falling_windows_have_a_stage_at_every_block_that_has_some() -> None:
    recipe = {**SCHEDULE, "scorer": "token-norm", "schedule": {"keep_ratio": 0.5, "falling": True}}
    model = tokenprune.wrap(swin(2, 2, 1, 1), recipe, train=False)
    assert tokenprune.profile(model).stages == (1, 2, 3, 4)  # of block 5 there is one window
    assert tokenprune.methods.method_named("windows-falling-k0.5").recipe() == {
        **{key: recipe[key] for key in ("mode", "scorer", "schedule")}
    }
    ratios = tokenprune.profile(model).tokens_per_block
    assert ratios[1] > ratios[2] > ratios[3]


def test_what_has_no_windows_is_refused() -> None:
    family = timm.models.vision_transformer.VisionTransformer
    plain = family(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(PlanError, match=r"none of the 2 blocks .* in windows. Use merge-k0.7"):
        tokenprune.wrap(plain, "windows-k0.5")
    late = {"version": 1, "mode": "windows", "stages": [{"block": 3, "keep_ratio": 0.5}]}
    with pytest.raises(PlanError, match=r"stage at block 3 .* more than one window.*\[0, 1, 2\]"):
        tokenprune.wrap(swin(1, 1, 1, 1), late)  # one window of 3 x 3 tokens is left there
