"""The recipe that `wrap` makes for a host when none is given."""

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tokenprune.analysis.blocks import find_blocks
from tokenprune.errors import PlanError
from tokenprune.reductions.choice import with_default_stages
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.host_graph import trace

VIT = timm.models.vision_transformer.VisionTransformer
SWIN = timm.models.swin_transformer.SwinTransformer


def stages(model: nn.Module) -> list[tuple[int, float]]:
    return [(s.block, s.keep_ratio) for s in pruning_of(model).recipe.resolved_stages]


def vit(depth: int) -> nn.Module:
    return VIT(img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=3)


@pytest.mark.parametrize(
    ("depth", "expected"), [(4, [(1, 0.7), (2, 0.49), (3, 0.343)]), (2, [(1, 0.7)])]
)
def test_tokens_leave_at_a_quarter_a_half_and_three_quarters(
    depth: int, expected: list[tuple[int, float]]
) -> None:
    assert stages(tokenprune.wrap(vit(depth), verify=False, train=False)) == expected


def test_a_grid_is_bypassed_where_its_longest_stretch_is() -> None:
    torch.manual_seed(0)
    host = SWIN(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 4, 1),
                num_heads=(2, 2, 2), num_classes=3)  # fmt: skip
    model = tokenprune.wrap(host, verify=False, train=False)
    assert pruning_of(model).method.reduction.name == "bypass"
    assert stages(model) == [(2, 0.7), (3, 0.5), (4, 0.3)]


def test_too_few_blocks_are_refused_with_their_number() -> None:
    with pytest.raises(
        PlanError, match=r"at least two blocks .* among the 1 blocks .* there are 1"
    ):
        tokenprune.wrap(vit(1))


def test_it_needs_no_weights_and_leaves_the_host_alone() -> None:
    host = vit(4).eval()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    spec = tokenprune.ArchSpec(
        adapter="here",
        blocks=tuple(f"blocks.{n}" for n in range(4)),
        num_prefix_tokens=1,
        mode="bypass",
    )
    traced = trace(host, {"x": torch.randn(2, 3, 16, 16)})
    recipe = with_default_stages(None, host, spec, traced, find_blocks(host, traced, spec))
    assert [stage.block for stage in recipe.resolved_stages] == [1, 2, 3]
    assert all(torch.equal(before[key], value) for key, value in host.state_dict().items())
