"""Bypass mode: the branch operators, and the per-token tail found in a host's graph."""

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tokenprune.errors import PlanError, UnsupportedHostError
from tokenprune.exporting.check import margins
from tokenprune.ops.bypass import choose_branch, merge_branches, take_tokens
from tokenprune.ops.layout import Layout, flat_tokens
from tokenprune.ops.moving import with_prefix
from tokenprune.reductions.bypass import BYPASSES, light_branch
from tokenprune.runtime.model import pruning_of

SWIN = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (1, 3, 1), "window_size": 4}
RECIPE = {
    "version": 1,
    "mode": "bypass",
    "stages": [{"block": 2, "keep_ratio": 0.7}, {"block": 3, "keep_ratio": 0.5}],
}


@pytest.fixture(scope="module")
def host() -> nn.Module:
    torch.manual_seed(0)
    swin = timm.models.swin_transformer.SwinTransformer
    return swin(**SWIN, num_heads=(2, 2, 2), num_classes=5).eval()


@pytest.fixture(scope="module")
def model(host: nn.Module) -> nn.Module:
    return tokenprune.wrap(host, RECIPE, verify=False, train=False).eval()


def test_merging_gives_each_token_the_branch_it_took() -> None:
    x = torch.arange(12.0).reshape(1, 2, 3, 2)
    kept = torch.tensor([[1, 4]])
    branch = take_tokens(x, kept) * 100
    merged = merge_branches(x, branch, kept, nn.Identity()).reshape(6, 2)
    expected = x.reshape(6, 2).clone()
    expected[[1, 4]] *= 100
    assert torch.equal(merged, expected)


def test_without_a_light_branch_the_others_get_0() -> None:
    kept, branch = torch.tensor([[0, 3], [1, 2]]), torch.randn(2, 2, 4)
    merged = merge_branches(torch.randn(2, 4, 4), branch, kept, None)
    assert torch.equal(merged.gather(1, kept[..., None].expand_as(branch)), branch)
    assert torch.equal(merged.abs().sum(-1) > 0, torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]) > 0)


def test_merging_all_tokens_is_the_branch_itself() -> None:
    x = torch.randn(2, 3, 4)
    everyone = torch.arange(3).expand(2, -1)
    assert take_tokens(x, everyone) is x
    assert torch.equal(merge_branches(x, x * 2, everyone, nn.Identity()), x * 2)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 12, 4), Layout()),
        ((2, 3, 4, 4), Layout()),
        ((2, 4, 3, 5), Layout(channels_first=True)),
        ((6, 5, 4), Layout(rows_per_image=3)),
        ((2, 2, 2, 3, 4), Layout()),
    ],
)
def test_any_layout_comes_back_as_it_was(shape: tuple[int, ...], layout: Layout) -> None:
    x = torch.randn(shape)
    tokens = flat_tokens(x, layout)
    rows = torch.tensor([[0, 3, 5], [1, 2, 7]])
    taken = take_tokens(x, rows, layout)
    assert taken.ndim == x.ndim
    one_row = layout._replace(rows_per_image=1)
    assert torch.equal(
        flat_tokens(taken, one_row), tokens.gather(1, rows[..., None].expand(-1, -1, 4))
    )
    merged = merge_branches(x, taken * 100, rows, nn.Identity(), layout)
    expected = tokens.clone()
    for image, kept in enumerate(rows):
        expected[image, kept] *= 100
    assert merged.shape == x.shape
    assert torch.equal(flat_tokens(merged, layout), expected)
    policy = torch.zeros(2, tokens.shape[1]).scatter(1, rows, 1.0)
    assert torch.equal(choose_branch(x, x * 100, policy, nn.Identity(), layout), merged)


def test_prefix_tokens_are_rows_that_stay() -> None:
    kept = torch.tensor([[0, 2], [1, 3]])
    assert with_prefix(kept, 0) is kept
    assert with_prefix(kept, 2).tolist() == [[0, 1, 2, 4], [0, 1, 3, 5]]


def test_choosing_is_merging_and_its_gradient_is_the_difference_of_the_branches() -> None:
    torch.manual_seed(0)
    x, branch, bypass = torch.randn(2, 6, 4), torch.randn(2, 6, 4), light_branch(4)
    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    decision = torch.zeros(2, 6).scatter(1, kept, 1.0).requires_grad_()
    chosen = choose_branch(x, branch, decision, bypass)
    rows = branch.gather(1, kept.unsqueeze(-1).expand(-1, -1, 4))
    torch.testing.assert_close(chosen, merge_branches(x, rows, kept, bypass))
    grad = torch.randn(2, 6, 4)
    (found,) = torch.autograd.grad(chosen, decision, grad)
    torch.testing.assert_close(found, (grad * (branch - bypass(x))).sum(-1))


def test_a_branch_that_is_not_taken_may_hold_anything() -> None:
    x, bypass = torch.randn(1, 4, 4), light_branch(4)
    decision = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    plain = choose_branch(x, x * 2, decision, bypass)
    assert torch.equal(choose_branch(x, x * 2, decision, bypass, poison=True), plain)


def test_the_tail_is_the_mlp_of_each_block(model: nn.Module, host: nn.Module) -> None:
    tails = model._pruning.programs({"x": torch.randn(2, 3, 64, 64)}).reduction.tails
    assert {block: tail.stage for block, tail in tails.items()} == {2: 0, 3: 1}
    tail = tails[2]  # block 4 sees a smaller grid
    inside = {str(node.target) for node in tail.inside if node.op == "call_module"}
    assert {"layers.1.blocks.1.mlp.fc1", "layers.1.blocks.1.mlp.fc2"} <= inside
    assert not any(".attn." in path for path in inside)


def test_state_holds_predictors_and_light_branches_beside_the_host(
    model: nn.Module, host: nn.Module
) -> None:
    added = set(model.state_dict()) - set(host.state_dict())
    assert {key.split(".")[0] for key in added} == {"token_predictors", BYPASSES}
    assert {key.split(".")[1] for key in added if key.startswith(BYPASSES)} == {"2", "3"}


def test_tokens_may_come_back(model: nn.Module) -> None:
    sets = [torch.tensor([[0, 1, 2]] * 2), torch.tensor([[7, 8, 9]] * 2)]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), model.using("mask", keep_indices=sets):
        mask = model(x)
    with torch.no_grad(), model.using("gather", keep_indices=sets):
        torch.testing.assert_close(model(x), mask)


def test_training_reaches_predictors_and_light_branches(model: nn.Module) -> None:
    model.train()
    try:
        out, trace = model(torch.randn(2, 3, 64, 64), return_trace=True)
        (out.square().mean() + sum(s.decision.mean() for s in trace.stages)).backward()
        for name, parameter in model.named_parameters():
            if name.startswith(("token_", BYPASSES)):
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
    finally:
        model.eval()
        model.zero_grad()


def test_a_grid_host_names_the_mode_it_needs(host: nn.Module) -> None:
    recipe = {"version": 1, "mode": "remove", "schedule": {"blocks": [2], "keep_ratio": 0.7}}
    with pytest.raises(PlanError, match=r"Block 2 .* has to keep.*needs `mode: bypass`.*a grid"):
        tokenprune.wrap(host, recipe)


def test_a_plain_host_may_be_bypassed_and_its_prefix_tokens_take_the_mlp() -> None:
    vit = timm.models.vision_transformer.VisionTransformer
    plain = vit(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=3)
    model = tokenprune.wrap(plain, RECIPE, train=False).eval()
    _, trace = model(torch.randn(2, 3, 32, 32), return_trace=True)
    assert [stage.num_tokens for stage in trace.stages] == [11, 8]
    assert trace.patch_tokens.shape == (2, 16, 32)


def test_each_stage_sees_the_grid_it_stands_on(host: nn.Module) -> None:
    recipe = {"version": 1, "mode": "bypass", "schedule": {"blocks": [0, 2], "keep_ratio": 0.5}}
    model = tokenprune.wrap(host, recipe, train=False).eval()
    programs = model._pruning.programs({"x": torch.randn(2, 3, 64, 64)})
    assert programs.num_patches == (256, 64)
    assert {block: tail.stage for block, tail in programs.reduction.tails.items()} == {
        0: 0,
        2: 1,
        3: 1,
    }
    _, trace = model(torch.randn(2, 3, 64, 64), return_trace=True)
    assert [stage.num_tokens for stage in trace.stages] == [128, 16]
    assert [p.dim for p in model.token_predictors] == [16, 32]
    assert "256 -> 128, 64 -> 16" in str(tokenprune.verify(model))


def test_a_block_without_an_mlp_is_refused_by_name() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x.transpose(1, 2)).transpose(1, 2)

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Mixer(), Mixer()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x.mean(1)

    spec = tokenprune.ArchSpec(
        adapter="here", blocks=("blocks.0", "blocks.1"), num_prefix_tokens=0, mode="bypass"
    )
    recipe = {"version": 1, "mode": "bypass", "schedule": {"blocks": [1], "keep_ratio": 0.5}}
    with pytest.raises(UnsupportedHostError, match="Block 1 has no residual branch that acts on"):
        tokenprune.wrap(Host(), recipe, example_inputs=torch.randn(2, 6, 8), adapter=spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "block", "channels_first"),
    [
        (
            "maxvit_nano_rw_256",
            {"img_size": 128, "embed_dim": (32,) * 4, "depths": (2, 1, 1, 1), "stem_width": 8},
            1,
            True,
        ),
        (
            "tiny_vit_5m_224",
            {"embed_dims": (8, 16, 40, 40), "depths": (1,) * 4, "window_sizes": (4, 4, 4, 2)},
            0,
            False,
        ),
    ],
)
def test_a_cube_of_tokens_is_read_as_its_block_reads_it(
    name: str,
    options: dict[str, object],
    block: int,
    channels_first: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = timm.create_model(name, **options).eval()
    recipe = {"version": 1, "mode": "bypass", "stages": [{"block": block, "keep_ratio": 0.5}]}
    images = {"x": torch.zeros(2, 3, 128, 128)}
    wrapped = tokenprune.wrap(host, recipe, example_inputs=images, verify=False, train=False)
    programs, *_ = pruning_of(wrapped).cache
    (marker,) = programs.analysis.markers
    assert len(set(marker.meta["val"].shape[1:])) == 1
    assert programs.analysis.grids[0].layout.channels_first == channels_first
    assert "failed while attempting" not in caplog.text


@torch.no_grad()
def test_the_margin_of_stages_on_two_grids(host: nn.Module) -> None:
    recipe = {"version": 1, "mode": "bypass", "schedule": {"blocks": [0, 2], "keep_ratio": 0.5}}
    model = tokenprune.wrap(host, recipe, verify=False, train=False).eval()
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    _, trace = model(**inputs, return_trace=True)
    gaps = []
    for stage in trace.stages:
        score = stage.keep_logits[..., 0].sort(dim=1, descending=True).values
        last = score.shape[1] // 2 if stage is trace.stages[0] else score.shape[1] // 4
        gaps.append(score[:, last - 1] - score[:, last])
    torch.testing.assert_close(margins(model, inputs), torch.stack(gaps).amin(0))
