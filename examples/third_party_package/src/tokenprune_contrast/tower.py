"""A host that no shipped adapter knows, and its adapter."""

import torch
from torch import Tensor, nn

from tokenprune import ArchSpec, ExampleInput

__all__ = ["ADAPTER", "Tower", "TowerAdapter"]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.mixer(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Tower(nn.Module):
    """Classifies a set of 24 points [B, 24, 16]; its blocks are three attributes, not a list."""

    def __init__(self, dim: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.low, self.middle, self.high = Block(dim), Block(dim), Block(dim)
        self.first = nn.Parameter(torch.randn(1, 1, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, points: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(len(points), -1, -1), points], dim=1)
        return self.head(self.high(self.middle(self.low(x)))[:, 0])


class TowerAdapter:
    """Where the blocks of a `Tower` are."""

    name = "tokenprune-contrast/tower"

    def matches(self, host: nn.Module) -> bool:
        return isinstance(host, Tower)

    def describe(self, host: nn.Module) -> ArchSpec:
        return ArchSpec(
            adapter=self.name,
            blocks=("low", "middle", "high"),
            num_prefix_tokens=1,
            inputs={"points": ExampleInput((24, 16))},
        )


ADAPTER = TowerAdapter()
