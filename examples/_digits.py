"""What the examples share: scikit-learn's 1,797 digits, and a small host trained on them.

Nothing is downloaded. On your own data you have a host and images already; then leave this out.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIZE = 32
TRAINED = Path(__file__).parents[1] / "runs/examples/vit.safetensors"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 3, size, size] in [-1, 1] and labels [N]: 1,437 to train on, 360 held out."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(small, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target)
    train, held_out = train_test_split(
        range(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    return images[train], labels[train], images[held_out], labels[held_out]


def small_vit(**options: Any) -> nn.Module:
    """A ViT of timm with 64 patch tokens and 6 blocks, with random weights."""
    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4}
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, **(shape | options))
    nn.init.normal_(host.pos_embed, std=0.5)  # timm's 0.02 needs dozens of epochs on so few images
    return host


def batches(images: Tensor, labels: Tensor, size: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
    """Shuffled batches of one epoch; a last one that is not full is left out."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
    for chosen in order.split(size):
        if len(chosen) == size:
            yield images[chosen], labels[chosen]


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    learning_rate: float = 2e-3,
    batch_size: int = 32,
) -> None:
    """Train a dense host: AdamW, one cycle of the learning rate."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.05)
    steps = epochs * (len(labels) // batch_size)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for epoch in range(epochs):
        for x, y in batches(images, labels, batch_size, epoch):
            loss(model(x), y).backward()
            optimizer.step()
            cycle.step()
            optimizer.zero_grad()
    model.eval()


def trained_vit(images: Tensor, labels: Tensor, epochs: int = 6) -> nn.Module:
    """`small_vit`, trained for half a minute; the first example that needs it keeps its weights."""
    host = small_vit()
    if TRAINED.exists():
        host.load_state_dict(load_file(TRAINED))
        return host.eval()
    started = time.perf_counter()
    train(host, images, labels, epochs)
    print(f"A ViT was trained on {len(labels)} digits in {time.perf_counter() - started:.0f} s.")
    TRAINED.parent.mkdir(parents=True, exist_ok=True)
    save_file(host.state_dict(), TRAINED)
    return host


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is right; the model is in eval mode afterwards."""
    logits = model.eval()(images)
    return float((logits.argmax(1) == labels).float().mean())
