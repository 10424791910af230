"""Whole toy hosts, each with one odd habit."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.toys.vit import WIDTH, Block, Vit


class Pooled(Vit):
    """Pools by a function of the normed tokens."""

    def __init__(self, how: Callable[[Tensor], Tensor], prefix: int) -> None:
        super().__init__(prefix)
        self.how = how

    def pool(self, x: Tensor) -> Tensor:
        return self.how(x)


class AttentionPooled(Vit):
    def __init__(self) -> None:
        super().__init__(prefix=0)
        self.query = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def pool(self, x: Tensor) -> Tensor:
        query = self.query.expand(x.shape[0], -1, -1)
        return F.scaled_dot_product_attention(query, x, x)[:, 0]


class ClassAttention(Vit):
    """The class token comes after the second block and only it asks, from the third on (CaiT)."""

    def __init__(self) -> None:
        super().__init__(prefix=0)
        self.late = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.asks, self.is_asked = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.run(self.embed(x)))
        late = self.late.expand(x.shape[0], -1, -1)
        keys = self.is_asked(torch.cat((late, x), dim=1))
        weights = (self.asks(late) @ keys.transpose(1, 2)).softmax(dim=-1)
        return self.head((late + weights @ keys)[:, 0])


class Masked(Vit):
    """Takes a mask of real patches and hides the others; `form` says in which shape."""

    def __init__(self, attention: type[nn.Module], additive: bool) -> None:
        super().__init__(1, partial(Block, attention))
        self.additive = additive

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        mask = None
        if real is not None:
            mask = F.pad(real, (1, 0), value=True)[:, None, None, :]
            if self.additive:
                mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -1e9)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x)[:, 0])


class ByKeyword(Vit):
    def __init__(self) -> None:
        super().__init__(1, KeywordBlock)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            (x,) = block(mask=None, hidden_states=x)
        return x


class KeywordBlock(Block):
    def forward(  # type: ignore[override]
        self, *, hidden_states: Tensor, mask: Tensor | None
    ) -> tuple[Tensor]:
        return (super().forward(hidden_states, mask),)


@dataclass
class Both:
    logits: Tensor
    features: Tensor
    unset: Tensor | None = None


class Returns(Vit):
    """Puts class logits and pooled features into a container."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        pooled = self.pool(self.norm(self.run(self.embed(x))))
        return self.pack(self.head(pooled), pooled)


class PythonInts(Vit):
    """Decides by sizes: a loop, a power, `int()`, `len`, `*shape`, a slice from a division."""

    def embed(self, x: Tensor) -> Tensor:
        x = super().embed(x)
        side = int((x.shape[1] - 1) ** 0.5)
        for row in range(side):
            if row % 2 and math.ceil(side / 2) > 1:
                x = torch.cat([x[:, : 1 + row * side], x[:, 1 + row * side :]], dim=1)
        if len(x) != x.size(0) or [*x.shape][1] != side * side + 1:
            raise ValueError("not a square")
        return x.reshape(*x.shape[:1], -1, x.shape[-1])


class Shared(Vit):
    """All blocks share one attention and one norm; one path of many leads to them."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[1:]:
            block.attn, block.norm1 = self.blocks[0].attn, self.blocks[0].norm1


class PlainAttribute(Vit):
    """Holds a tensor that is neither parameter nor buffer, and a list of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0, 1, 17)[:, None]
        self.scales = [0.5, 2.0]

    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x + self.table[: x.shape[1]] * self.scales[i % 2])
        return x


class LongSkip(Vit):
    """Adds the embedded image to what the second block made of it."""

    def run(self, x: Tensor) -> Tensor:
        embedded = x
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1:
                x = x + embedded
        return x


class Caches(Vit):
    """Makes a table of positions once for each length, and keeps it in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def embed(self, x: Tensor) -> Tensor:
        x = super().embed(x)
        length = int(x.shape[1])
        if length not in self.cache:
            self.cache[length] = torch.arange(length, dtype=x.dtype).sin()[:, None]
        return x + self.cache[length]


class KeepsTheNewest(Vit):
    """Keeps the table of the length it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: Tensor | None = None

    def embed(self, x: Tensor) -> Tensor:
        x = super().embed(x)
        if self.newest is None or len(self.newest) != x.shape[1]:
            self.newest = torch.arange(x.shape[1], dtype=x.dtype).sin()[:, None]
        return x + self.newest


@lru_cache
def positions(length: int) -> Tensor:
    return torch.arange(length).sin()[:, None]


class CachesGlobally(Vit):
    """Its table is kept by a function, for every model of the process."""

    def embed(self, x: Tensor) -> Tensor:
        x = super().embed(x)
        return x + positions(int(x.shape[1])).to(x.dtype)


class Checkpointed(Vit):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


class OneImageBranch(Vit):
    """Takes another branch for a single image."""

    def pool(self, x: Tensor) -> Tensor:
        pooled = super().pool(x)
        return pooled * 2 if x.shape[0] == 1 else pooled
