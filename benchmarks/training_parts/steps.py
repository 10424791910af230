"""One training step of a model: the dense host, or the mask path."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tokenprune.losses import PruningLoss
from tokenprune.recipe import load_recipe

__all__ = ["Kind", "Step", "make_step", "peak_bytes", "squares"]

Kind = Literal["dense", "mask"]
Step = Callable[[], None]
HOST, RECIPE, CLASSES = "deit_small_patch16_224", "dynamicvit-deit-small-k0.7", 1000


def make_step(kind: Kind, batch_size: int) -> Step:
    """Forward, backward and AdamW on random images, without a teacher."""
    torch.manual_seed(0)
    host: nn.Module = timm.create_model(HOST)
    images = torch.randn(batch_size, 3, 224, 224)
    labels = torch.randint(0, CLASSES, (batch_size,))
    if kind == "dense":
        return _step(host, lambda: F.cross_entropy(host(images), labels))
    model: Any = tokenprune.wrap(copy.deepcopy(host), RECIPE, verify=False)
    wanted = tuple(stage.keep_ratio for stage in load_recipe(RECIPE).resolved_stages)
    loss = PruningLoss(keep_ratios=wanted, distill_logits=0, distill_tokens=0)

    def pruned() -> Tensor:
        logits, trace = model(images, return_trace=True)
        total, _ = loss(logits, labels, [stage.decision for stage in trace.stages])
        return total

    return _step(model, pruned)


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def squares(kind: Kind, batch_size: int = 2) -> int:
    """How many tensors [.., L, L] over tokens a step keeps for backward."""
    found = 0

    def look(tensor: Tensor) -> Tensor:
        nonlocal found
        found += tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] == 197
        return tensor

    step = make_step(kind, batch_size)
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        step()
    return found


def peak_bytes(kind: Kind, batch_size: int) -> int:
    """Largest resident memory of this process in two steps, minus that before them.

    Call it in a new process. A first step of one image loads all code before the measurement.
    """
    make_step(kind, 1)()
    before = _status("VmRSS")
    step = make_step(kind, batch_size)
    step()
    step()
    return _status("VmHWM") - before


def _status(line: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(
        int(entry.split()[1]) * 1024 for entry in text.splitlines() if entry.startswith(line)
    )
