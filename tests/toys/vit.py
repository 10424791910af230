"""A small vision transformer whose every step a toy host can change."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "Vit", "pixels", "randomize_weights"]

WIDTH, HEADS, PATCH, CLASSES, DEPTH = 16, 2, 4, 5, 3
SIZES = (16, 24)  # pixels: 16 and 36 patches


class Attention(nn.Module):
    """Fused attention. Subclasses change one step each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(q, k, v, mask).transpose(1, 2).reshape(B, L, D))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Block(nn.Module):
    """Pre-norm block with LayerScale."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.gamma1 = nn.Parameter(torch.ones(WIDTH))
        self.gamma2 = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x), mask)
        return x + self.gamma2 * self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Patches, prefix tokens, positions that follow the image size, blocks, norm, head."""

    def __init__(self, prefix: int = 1, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.prefix = prefix
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(torch.zeros(1, WIDTH, 4, 4))
        self.tokens = nn.Parameter(torch.zeros(1, prefix, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.pool(self.norm(self.run(self.embed(x)))))

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = x + F.interpolate(self.position, size=x.shape[-2:], mode="bilinear")
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.prefix else x.mean(dim=1)


def pixels(batch: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + batch)
    return torch.randn(batch, 3, size, size, generator=generator)


def randomize_weights(host: nn.Module, factor: float) -> None:
    """Random weights that hide no error; query, key and value projections times `factor`.

    LayerScale and norms are random in (0.5, 1.5), tables and prefix tokens of scale 0.5.
    """
    with torch.no_grad():
        for path, parameter in host.named_parameters():
            own = path.rpartition(".")[2]
            if parameter.ndim == 1 and own != "bias" and "bias" not in own:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in own:
                parameter.normal_(std=0.1)
            elif "qkv" in path or own == "in_proj_weight":
                parameter.normal_(std=0.02 * factor)
            elif own == "weight":
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.5)
