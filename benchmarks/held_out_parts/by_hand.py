"""Hosts as people write them: torch's own encoders, loops by hand, odd attentions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.held_out_parts.host import HeldOut, image

__all__ = ["hosts"]

WIDTH, HEADS, DEPTH = 32, 4, 4


class Patches(nn.Module):
    """Patch embedding with positions, and perhaps a class token."""

    def __init__(self, class_token: bool = True, patch: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, patch, patch)
        count = (32 // patch) ** 2 + class_token
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH)) if class_token else None
        self.places = nn.Parameter(torch.randn(1, count, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        if self.first is not None:
            x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        return x + self.places


class Torchs(nn.Module):
    """`nn.TransformerEncoder`."""

    def __init__(
        self, *, mean: bool = False, mask: str = "", norm: bool = False, **how: Any
    ) -> None:
        super().__init__()
        how = {"batch_first": True, "dropout": 0.1, **how}
        self.mean, self.mask, self.first = mean, mask, how["batch_first"]
        self.embed = Patches(class_token=not mean)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, **how)
        last = nn.LayerNorm(WIDTH) if norm else None
        self.encoder = nn.TransformerEncoder(layer, DEPTH, last, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x, given = self.embed(x), {}
        length = x.shape[1]
        if self.mask == "causal":
            given["mask"] = nn.Transformer.generate_square_subsequent_mask(length)
        elif self.mask == "bool":
            given["mask"] = torch.ones(length, length, dtype=torch.bool).triu(3)
        elif self.mask == "padding":
            hidden = torch.zeros(len(x), length, dtype=torch.bool)
            hidden[:, -2:] = True
            given["src_key_padding_mask"] = hidden
        x = x if self.first else x.transpose(0, 1)
        x = self.encoder(x, **given)
        x = x if self.first else x.transpose(0, 1)
        y: Tensor = self.head(x.mean(1) if self.mean else x[:, 0])
        return y


class Layers(nn.Module):
    """A host whose blocks are run by `run`, made of `attend` and a feed-forward part."""

    def __init__(
        self, run: Callable[[Any, Tensor], Tensor], attend: Callable[[], nn.Module], **how: Any
    ) -> None:
        super().__init__()
        self.run, self.how = run, how
        self.embed = Patches(how.get("class_token", True))
        self.attend = nn.ModuleList(attend() for _ in range(DEPTH))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
            for _ in range(DEPTH)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4 * DEPTH))
        self.gates = nn.ParameterList(nn.Parameter(torch.ones(WIDTH) / 2) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self, self.embed(x))
        y: Tensor = self.head(x.mean(1) if self.how.get("mean") else x[:, 0])
        return y


def pre_norm(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        x = x + host.attend[i](host.norms[2 * i](x))
        x = x + host.feed[i](host.norms[2 * i + 1](x))
    return x


def post_norm(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        x = host.norms[2 * i](x + host.attend[i](x))
        x = host.norms[2 * i + 1](x + host.feed[i](x))
    return x


def sandwich(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        a, b, c, d = host.norms[4 * i : 4 * i + 4]
        x = x + b(host.attend[i](a(x)))
        x = x + d(host.feed[i](c(x)))
    return x


def parallel(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        y = host.norms[i](x)
        x = x + host.attend[i](y) + host.feed[i](y)
    return x


def scaled(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        x = x + host.gates[i] * host.attend[i](host.norms[2 * i](x))
        x = x + host.gates[i] * host.feed[i](host.norms[2 * i + 1](x))
    return x


def gated(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        g = host.gates[i].sigmoid()
        x = (1 - g) * x + g * host.attend[i](host.norms[2 * i](x))
        x = (1 - g) * x + g * host.feed[i](host.norms[2 * i + 1](x))
    return x


def shared(host: Any, x: Tensor) -> Tensor:
    for _ in range(DEPTH):
        x = x + host.attend[0](host.norms[0](x))
        x = x + host.feed[0](host.norms[1](x))
    return x


def two_attentions(host: Any, x: Tensor) -> Tensor:
    for i in range(0, DEPTH, 2):
        x = x + host.attend[i](host.norms[2 * i](x))
        x = x + host.attend[i + 1](host.norms[2 * i + 1](x))
        x = x + host.feed[i](host.norms[2 * i + 2](x))
    return x


def attention_alone(host: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        x = x + host.attend[i](host.norms[i](x))
    return x


def collects(host: Any, x: Tensor) -> Tensor:
    seen = []
    for i in range(DEPTH):
        x = x + host.attend[i](host.norms[2 * i](x))
        x = x + host.feed[i](host.norms[2 * i + 1](x))
        seen.append(x[:, 0])
    return x + torch.stack(seen).mean(0)[:, None]


class ByHand(nn.Module):
    """Attention written out; `kind` says how."""

    def __init__(self, kind: str = "matmul") -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.Conv2d(HEADS, HEADS, 1)
        self.memory = nn.Parameter(torch.randn(1, HEADS, 2, WIDTH // HEADS))
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.kind == "torch":
            y: Tensor = self.inner(x, x, x, need_weights=False)[0]
            return y
        if self.kind == "torch weights":
            y, _ = self.inner(x, x, x)
            return self.out(y)  # type: ignore[no-any-return]
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        if self.kind == "memory":
            k = torch.cat([k, self.memory.expand(batch, -1, -1, -1)], dim=2)
            v = torch.cat([v, self.memory.expand(batch, -1, -1, -1)], dim=2)
        if self.kind == "one key":
            k, v = k[:, :1], v[:, :1]
        if self.kind == "fused":
            z = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(scale).softmax(-1)
            z = torch.einsum("bhij,bhjd->bhid", weights, v)
        elif self.kind == "linear":
            q, k = q.softmax(-1), k.softmax(-2)
            z = q @ (k.transpose(-1, -2) @ v)
        elif self.kind == "kernel":
            q, k = F.elu(q) + 1, F.elu(k) + 1
            total = q @ k.sum(-2, keepdim=True).transpose(-1, -2)
            z = (q @ (k.transpose(-1, -2) @ v)) / total
        elif self.kind == "channels":
            q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
            z = v @ (k.transpose(-1, -2) @ q).softmax(-2)
        else:
            scores = q @ k.transpose(-1, -2) * scale
            if self.kind == "talking":
                scores = self.heads(scores)
            weights = scores.softmax(-1)
            if self.kind == "talking":
                weights = self.heads(weights)
            z = weights @ v
        return self.out(z.transpose(1, 2).reshape(batch, length, WIDTH))  # type: ignore[no-any-return]


class Attributes(nn.Module):
    """Blocks that are attributes, in a forward without a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Patches()
        for i in range(3):
            setattr(self, f"attn{i}", ByHand("fused"))
            setattr(self, f"norm{i}", nn.LayerNorm(WIDTH))
            setattr(
                self, f"ff{i}", nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
            )
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn0(self.norm0(x))
        x = x + self.ff0(x)
        x = x + self.attn1(self.norm1(x))
        x = x + self.ff1(x)
        x = x + self.attn2(self.norm2(x))
        x = x + self.ff2(x)
        y: Tensor = self.head(x[:, 0])
        return y


class EncoderDecoder(nn.Module):
    """DETR in small: an encoder over patches, queries that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Patches(class_token=False)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        other = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.decoder = nn.TransformerDecoder(other, 2)
        self.queries = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(self.embed(x))
        y: Tensor = self.head(self.decoder(self.queries.expand(len(x), -1, -1), memory))
        return y


def hosts() -> Iterator[HeldOut]:
    """The rows."""
    torchs: dict[str, dict[str, Any]] = {
        "post-norm": {},
        "pre-norm": {"norm_first": True},
        "pre-norm, last norm": {"norm_first": True, "norm": True},
        "mean": {"mean": True},
        "gelu, no bias": {"activation": "gelu", "bias": False},
        "sequence first": {"batch_first": False},
        "causal mask": {"mask": "causal", "mean": True},
        "flags as mask": {"mask": "bool"},
        "padding mask": {"mask": "padding"},
    }
    for name, how in torchs.items():
        yield _row("nn.TransformerEncoder", name, lambda how=how: Torchs(**how))
    yield _row("nn.TransformerEncoder", "encoder and decoder", EncoderDecoder)
    for run in (pre_norm, post_norm, sandwich, parallel, scaled, gated, shared, two_attentions):
        yield _row("by hand", run.__name__, lambda run=run: Layers(run, lambda: ByHand("fused")))
    for run in (attention_alone, collects):
        yield _row("by hand", run.__name__, lambda run=run: Layers(run, lambda: ByHand("matmul")))
    yield _row("by hand", "attributes", Attributes)
    for kind in (
        *("matmul", "einsum", "talking", "memory", "one key", "linear", "kernel", "channels"),
        *("torch", "torch weights"),
    ):
        make = lambda kind=kind: Layers(pre_norm, lambda: ByHand(kind), mean=True)  # noqa: E731
        yield _row("by hand", f"attention: {kind}", make)


def _row(library: str, name: str, make: Callable[[], nn.Module]) -> HeldOut:
    return HeldOut(library=library, model=name, make=make, draw=image())
