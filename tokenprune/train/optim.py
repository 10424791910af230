"""Parameter groups, learning rates, frozen parameters.

The parts of DynamicViT's training that its paper leaves open; see the `train` section of a recipe.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tokenprune.notices import warn_once
from tokenprune.recipe.schema import TrainSection
from tokenprune.runtime.added import added_names

__all__ = ["Schedule", "frozen_names", "make_optimizer", "make_scheduler", "parameter_groups"]

LONGEST_SPAN = 0.25


@dataclass(frozen=True)
class Schedule:
    """Factors of the peak learning rate over `total` optimiser steps.

    They grow linearly in the first `warmup` steps, then follow a cosine down to `floor`. In the
    first `frozen` steps the host is not trained.
    """

    total: int
    warmup: int
    frozen: int
    floor: float

    @classmethod
    def of(cls, config: TrainSection, total: int) -> "Schedule":
        """The schedule of a recipe over a run of `total` steps.

        Warm-up and frozen epochs never take more than a quarter of the run each, however short.
        """
        warmup, frozen = (
            round(total * min(epochs / config.epochs, LONGEST_SPAN))
            for epochs in (config.warmup_epochs, config.frozen_epochs)
        )
        floor = min(config.min_learning_rate / config.learning_rate, 1.0)
        return cls(total, warmup, frozen, floor)

    def new(self, step: int) -> float:
        """Factor of the added parameters."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.total - self.warmup, 1)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def host(self, step: int) -> float:
        """Factor of the host's own parameters."""
        return 0.0 if step < self.frozen else self.new(step)


def frozen_names(model: nn.Module, parts: Iterable[str]) -> set[str]:
    """Names of the host's parameters that contain one of `parts`; warns if none contains a part."""
    host = [name for name, _ in model.named_parameters() if not _is_new(name)]
    found: set[str] = set()
    for part in parts:
        matching = {name for name in host if part in name}
        if not matching:
            warn_once(
                model,
                f"frozen_parameters {part!r}",
                f"train.frozen_parameters holds {part!r}, which is part of no parameter's name in "
                f"this {type(model).__name__}; nothing is frozen by it. Leave it out, or write a "
                "part of a name that model.named_parameters() has.",
            )
        found |= matching
    return found


def parameter_groups(model: nn.Module, config: TrainSection) -> list[dict[str, Any]]:
    """Up to four groups: new or the host's, with and without weight decay.

    Biases, other parameters of one dimension, and what the host's `no_weight_decay()` names are not
    decayed. Parameters that need no gradient are left out. A dense host has no new ones.
    """
    named = getattr(model, "no_weight_decay", None)
    exempt = set(named()) if callable(named) else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
            groups.setdefault((_is_new(name), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{'new' if new else 'host'}{'' if decays else ' without decay'}",
            "lr": config.learning_rate * (1.0 if new else config.backbone_lr_scale),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (new, decays), parameters in sorted(groups.items(), reverse=True)
    ]


def make_optimizer(model: nn.Module, config: TrainSection) -> torch.optim.Optimizer:
    """AdamW over the groups of `parameter_groups`."""
    # many times faster on small models; exists for these two devices
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.learning_rate, fused=fused)


def make_scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule) -> LambdaLR:
    """The schedule of each of the optimizer's groups."""
    added = [group["name"].startswith("new") for group in optimizer.param_groups]
    return LambdaLR(optimizer, [schedule.new if new else schedule.host for new in added])


def _is_new(name: str) -> bool:
    return name.startswith(added_names())
