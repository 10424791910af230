"""Mode `skip`: tokens that are not kept keep their value, on every grid."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tests.toys.vit import randomize_weights
from tokenprune.errors import PlanError, UnsupportedHostError
from tokenprune.runtime.model import pruning_of

IMAGES = torch.Size((2, 3, 64, 64))


def seeded(build: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build(num_classes=3, **options).eval()
    randomize_weights(model, 2.0)
    return model


class Placed(nn.Module):
    """An attention that adds something to its own input first."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.place = attention, nn.Linear(16, 16)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return self.attention(x + self.place(x), *args, **options)  # type: ignore[no-any-return]


def pvt() -> nn.Module:
    sizes: dict[str, Any] = {"depths": (1, 2), "embed_dims": (8, 16), "num_heads": (1, 2)}
    sizes |= {"sr_ratios": (2, 1), "mlp_ratios": (4, 4)}
    return seeded(timm.models.pvt_v2.PyramidVisionTransformerV2, **sizes)


def convformer() -> nn.Module:
    """Nothing attends here, so blocks have no middle; what a branch is added to is scaled first."""
    mixer = timm.models.metaformer.SepConv
    sizes: dict[str, Any] = {"depths": (1, 2, 1), "dims": (8, 16, 16), "token_mixers": mixer}
    sizes["res_scale_init_values"] = (None, 1.0, 1.0)
    return seeded(timm.models.metaformer.MetaFormer, **sizes)


def vit() -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return seeded(timm.models.vision_transformer.VisionTransformer, **sizes)


def test_every_grid_has_stages_and_nothing_is_added() -> None:
    host = pvt()
    model = tokenprune.wrap(host, "skip-k0.5", example_inputs=torch.randn(IMAGES))
    assert set(model.state_dict()) == set(host.state_dict())
    counted = tokenprune.profile(model)
    assert (counted.stages, counted.patches_per_stage) == ((0, 1, 2), (256, 64, 64))
    assert pruning_of(model).budget.keep_ratios[-1] == 0.125
    assert counted.ratio < 0.9
    parts = pruning_of(model).programs(pruning_of(model).as_wrapped()).reduction.parts
    # the projection of block 2 follows the stage in block 1; a downsampling lies before block 1
    assert [(block, part.stage) for block, part in parts] == [(0, 0), (1, 1), (2, 1), (2, 2)]


@torch.no_grad()
def test_a_token_that_is_not_kept_keeps_its_value() -> None:
    host = vit().double()
    host.blocks[1].attn = Placed(host.blocks[1].attn).double()  # keys and values are of all tokens
    recipe = {"version": 1, "mode": "skip", "place": "entry"}
    recipe |= {"stages": [{"block": 1, "keep_ratio": 0.5}, {"block": 2, "keep_ratio": 0.5}]}
    model = tokenprune.wrap(host, recipe, train=False, verify=False)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    images, kept = torch.randn(IMAGES).double(), torch.tensor([[0, 2, 5, 7, 8, 9, 11, 15]] * 2)
    handle = model.blocks[1].register_forward_hook(
        lambda _, given, made: seen.update(now=(given[0].clone(), made.clone()))
    )
    for path in ("dense", "gather", "mask"):
        options = {} if path == "dense" else {"keep_indices": [kept, kept]}
        with model.using(path, **options):
            model(images)
        seen[path] = seen["now"]
    handle.remove()
    stays = torch.ones(17, dtype=torch.bool)
    stays[kept[0] + 1] = stays[0] = False  # the class token is no patch
    for path in ("gather", "mask"):
        given, made = seen[path]
        assert torch.equal(made[:, stays], given[:, stays])
        torch.testing.assert_close(made[:, ~stays], seen["dense"][1][:, ~stays])


def test_where_nothing_attends_stages_are_at_entries_behind_the_first_block() -> None:
    model = tokenprune.wrap(convformer(), "skip-k0.7", example_inputs=torch.randn(IMAGES))
    pruning = pruning_of(model)
    assert pruning.recipe.place == "entry"
    parts = pruning.programs(pruning.as_wrapped()).reduction.parts
    assert [block for block, _ in parts] == [1, 1, 2, 2, 3, 3]  # a convolution and an MLP each
    assert tokenprune.profile(model).stages == (1, 2, 3)


def test_tokens_straight_out_of_a_norm_are_not_told_apart() -> None:
    build = timm.models.focalnet.FocalNet
    sizes = {"depths": (2, 2), "embed_dim": 8, "focal_levels": (1, 1), "focal_windows": (3, 3)}
    model = tokenprune.wrap(
        seeded(build, **sizes), "skip-k0.7", example_inputs=torch.randn(IMAGES), verify=False
    )
    assert tokenprune.profile(model).stages == (1, 3)  # a norm is in front of block 2


def test_what_it_cannot_do_is_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x.transpose(1, 2)).transpose(1, 2)

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Mixer(), Mixer()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.mean(1)

    spec = tokenprune.ArchSpec(
        adapter="here", blocks=("blocks.0", "blocks.1"), num_prefix_tokens=0, mode="bypass"
    )
    given: dict[str, Any] = {"example_inputs": torch.randn(2, 6, 8), "adapter": spec}
    with pytest.raises(PlanError, match=r"at least a block with a branch that tokens can go"):
        tokenprune.wrap(Host(), "skip-k0.7", **given)
    stages = {"version": 1, "mode": "skip", "place": "entry"}
    stages |= {"stages": [{"block": 1, "keep_ratio": 0.5}]}
    with pytest.raises(UnsupportedHostError, match=r"block 1 was asked for with `mode: skip`, but"):
        tokenprune.wrap(Host(), stages, **given)
    model = tokenprune.wrap(vit(), "skip-k0.7", train=False, verify=False)
    with pytest.raises(PlanError, match="no probabilities"):
        model.set_threshold(0.5)
