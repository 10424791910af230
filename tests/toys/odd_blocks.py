"""Attentions and blocks of toy hosts, each with one odd habit."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toys.vit import HEADS, WIDTH, Attention, Block


class Eager(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores + mask
        return self.drop(scores.softmax(dim=-1)) @ v


class ByHand(Attention):
    """A softmax spelled out."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = torch.matmul(q, k.mT).mul(0.1).tanh().exp()
        return torch.matmul(weights / weights.sum(dim=-1, keepdim=True), v)


class TalkingHeads(Attention):
    """Heads are mixed before and after the softmax, with a bias that gives every key a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = self.before((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


class Causal(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class OneKeyHead(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


class Torchs(nn.Module):
    """torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * table.cos() + torch.cat([-other, one], dim=-1) * table.sin()


class Rope(Attention):
    """Angles [N, d] for patches only; prefix tokens are cut off and put back."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.register_buffer("angles", torch.randn(16, WIDTH // HEADS), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, patches = x[:, :, : self.prefix], x[:, :, self.prefix :]
        return torch.cat([first, rotate(patches, self.angles)], dim=2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().mix(self.turned(q), self.turned(k), v, mask)


class RopeByLength(Attention):
    """Angles for all tokens, made from the token count, before heads come first."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).reshape(B, L, 3, HEADS, D // HEADS).unbind(2)
        angles = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None, None] * 0.3
        q, k = (rotate(t, angles).transpose(1, 2) for t in (q, k))
        return self.proj(self.mix(q, k, v.transpose(1, 2), mask).transpose(1, 2).reshape(B, L, D))


class RelativeBias(Eager):
    """A table indexed by the distance of two patches; no prefix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(31, HEADS))
        place = torch.arange(16)
        self.register_buffer("index", place[:, None] - place + 15)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().mix(q, k, v, self.table[self.index].permute(2, 0, 1))


class QueryKeyNorm(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH // HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().mix(self.norm(q), self.norm(k), v, mask)


class InPlace(Block):
    """Writes into tensors: item assignment, in-place methods and operators, through a view."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x)).mul_(self.gamma1)
        x[:, 0] = x[:, 0] * 0.5
        x[:, 1:] += 0.1
        y = self.mlp(self.norm2(x))
        view = y.view(y.shape)
        view *= self.gamma2
        return y.add_(x)


class InPlaceAtEntry(Block):
    """Writes into the very tensor that it is given."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x += 0.1
        return super().forward(x, mask)


class PositionEachTime(Block):
    """Adds a sinusoid made from the token count in every block."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return super().forward(x + 0.1 * steps.sin().unsqueeze(-1))


class Remembers(Block):
    """Keeps its last input, as many hosts do for plots."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.last_input = x
        return super().forward(x, mask)
