"""`find_blocks`: entries, middles and attentions of a host's blocks, and stages at a middle."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

import tokenprune
from tests.zoo.hosts import ZOO
from tests.zoo.rows import Row
from tokenprune.errors import PlanError

PLAIN = [row for row in ZOO if row.mode == "remove" and not row.refused]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in PLAIN if row.core])
def test_stages_at_a_middle_are_certified(row: Row) -> None:
    recipe = {**row.recipe, "place": "middle"}
    options = {"example_inputs": row.inputs(), "verify": False, "train": False}
    model = tokenprune.wrap(row.build(5.0), recipe, **options)
    assert all(check.passed for check in tokenprune.verify(model, row.inputs()).checks)
    # the attention of the first staged block still sees every token
    block = row.recipe["schedule"]["blocks"][0]
    entry = tokenprune.wrap(row.build(5.0), row.recipe, **options)
    macs = [tokenprune.profile(m).macs_per_block[block] for m in (model, entry)]
    assert macs[0] > macs[1]


def vit(**options: Any) -> nn.Module:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.VisionTransformer(**small, num_classes=5, **options)


def test_a_place_that_a_block_does_not_have() -> None:
    recipe = {"version": 1, "place": "middle", "schedule": {"blocks": [1], "keep_ratio": 0.5}}
    parallel = vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(PlanError, match=r"Block 1 \('blocks.1'\) has no middle: .* `place: entry`"):
        tokenprune.wrap(parallel, recipe)
    with pytest.raises(PlanError, match=r"`place: middle`, but stages of `mode: bypass` can be"):
        tokenprune.wrap(vit(), {**recipe, "mode": "bypass"})


def test_a_block_that_hands_its_input_on_is_read_from_its_marker() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x[:, :, 0] = x[:, :, 1] * 2
            return x

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Writes(), Writes()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            for block in self.blocks:
                x = block(x)
            return x[:, 0] + x.mean(1)

    spec = tokenprune.ArchSpec(
        adapter="by hand", blocks=("blocks.0", "blocks.1"), num_prefix_tokens=1
    )
    recipe = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.5}}
    x = torch.randn(2, 9, 4)
    model = tokenprune.wrap(
        Host(), recipe, adapter=spec, example_inputs=x, verify=False, train=False
    ).eval()
    sets = [torch.tensor([[0, 2, 5]] * 2), torch.tensor([[2, 5]] * 2)]
    with torch.no_grad(), model.using("gather", keep_indices=sets):
        output, trace_ = model(x, return_trace=True)
    expected = x[:, [0, 3, 6]].clone()
    expected[:, :, 0] = expected[:, :, 1] * 2
    assert torch.allclose(output, expected[:, 0] + expected.mean(1))
    assert trace_.patch_tokens.shape == (2, 2, 4)
