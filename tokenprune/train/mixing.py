"""Mixup, CutMix and label smoothing of a batch."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.recipe.schema import TrainSection

__all__ = ["Mixing", "criterion"]


class Mixing:
    """Mixes the images of a batch in pairs, first with last; without mixup and cutmix does nothing.

    Draws from numpy's global generator; checkpoints hold its state.
    """

    def __init__(self, config: TrainSection, num_classes: int) -> None:
        self.num_classes, self.smoothing = num_classes, config.label_smoothing
        self.mix = None
        if config.mixup or config.cutmix:
            from timm.data import Mixup

            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images, and targets: class probabilities [B, classes] if mixed, else `labels`.

        The last image of an odd batch has no partner and stays as it is.
        """
        if self.mix is None:
            return images, labels
        pairs = len(images) // 2 * 2
        smooth = self.smoothing
        targets = F.one_hot(labels, self.num_classes) * (1 - smooth) + smooth / self.num_classes
        if pairs:
            # Mixup writes into the images it is given
            mixed, mixed_targets = self.mix(images[:pairs].clone(), labels[:pairs])
            images = torch.cat([mixed, images[pairs:]])
            targets = torch.cat([mixed_targets.to(targets), targets[pairs:]])
        return images, targets


def criterion(config: TrainSection) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy, with label smoothing unless mixing smooths the targets."""
    if config.mixup or config.cutmix or not config.label_smoothing:
        return F.cross_entropy
    return partial(F.cross_entropy, label_smoothing=config.label_smoothing)
