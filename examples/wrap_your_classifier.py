"""Wrap a classifier of your own: same calls, same outputs, same weights, and a proof."""

import tempfile
from pathlib import Path

import torch
from _digits import accuracy, digits, train
from torch import Tensor, nn

import tokenprune


class Block(nn.Module):
    """Attention and an MLP, each with a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """A vision transformer that knows nothing of tokenprune."""

    def __init__(self, dim: int = 48, depth: int = 6, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 1 + (32 // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


images, labels, held_out, answers = digits()
torch.manual_seed(0)
host = Classifier()
train(host, images, labels, epochs=5)
dense = accuracy(host, held_out, answers)

# A class of your own needs an example of its inputs; timm and transformers models do not.
model = tokenprune.wrap(host, "merge-k0.7", example_inputs=images[:2]).eval()
pruned = accuracy(model, held_out, answers)
print(f"{100 * dense:.2f} % dense, {100 * pruned:.2f} % at keep ratio 0.7")
print(f"{tokenprune.profile(model).ratio:.3f} of the MACs")

# `wrap` has proven this already; here is what it proved on this very model.
certificate = tokenprune.verify(model)
print(certificate)

# Same class, same keys, the very same parameters.
same = {
    "class": isinstance(model, Classifier),
    "keys": model.state_dict().keys() == host.state_dict().keys(),
    "parameters": model.head.weight is host.head.weight,
}
with torch.no_grad(), model.using("dense"):
    same["dense output, bit for bit"] = torch.equal(model(held_out), host(held_out))
same["unwrapped"] = tokenprune.unwrap(model) is host

# A folder with weights and recipe, and back.
with tempfile.TemporaryDirectory() as folder:
    tokenprune.save(model, folder)
    print("saved:", *sorted(path.name for path in Path(folder).iterdir()))
    again = tokenprune.load(folder, Classifier(), example_inputs=images[:2]).eval()
with torch.no_grad():
    same["loaded output"] = torch.equal(again(held_out), model(held_out))

for name, found in same.items():
    print(f"{name}: {'the same' if found else 'NOT the same'}")
if not all(same.values()):
    raise SystemExit("the wrapped model is not what its host was")
if dense - pruned > 0.03:
    raise SystemExit(f"pruning lost {100 * (dense - pruned):.2f} points, expected 3 at most")
