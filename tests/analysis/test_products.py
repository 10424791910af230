"""Blocks: the attention and the middle that are found in them."""

import torch
from torch import Tensor, nn

import tokenprune

WIDTH, LENGTH = 8, 10


class ByKeyword(nn.Module):
    """A block that calls its products with keywords only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = torch.matmul(input=q, other=k.transpose(1, 2))
        x = x + torch.matmul(input=scores.softmax(-1), other=v)
        return x + self.mlp(x)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ByKeyword(), ByKeyword(), ByKeyword()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def test_products_by_keyword_are_found_and_masked() -> None:
    torch.manual_seed(0)
    spec = tokenprune.ArchSpec(
        adapter="by hand", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=1
    )
    recipe = {"version": 1, "place": "middle", "schedule": {"blocks": [1], "keep_ratio": 0.6}}
    example = torch.randn(2, LENGTH, WIDTH)
    model = tokenprune.wrap(Host().eval(), recipe, adapter=spec, example_inputs=example)
    programs, *_ = model._pruning.cache
    block = programs.analysis.blocks[1]
    assert block.attention is not None
    assert block.attention.key.meta["val"].shape == (2, WIDTH, LENGTH)
    assert block.middle is not None
