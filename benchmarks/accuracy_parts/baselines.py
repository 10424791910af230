"""Scores without learning: random, and the attention of the class token.

They replace the predictors, so a model prunes by them on the same gather path, at the same counts,
and is trained on that path.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.losses import distill_logits
from tokenprune.losses.logits import class_logits
from tokenprune.rewrite.settings import Path as ModelPath
from tokenprune.train.image_trainer import ImageTrainer

__all__ = ["BaselineTrainer", "ClassAttention", "RandomScores"]


class RandomScores(nn.Module):
    """Random keep scores, drawn in each forward."""

    def forward(self, patches: Tensor, policy: Tensor | None = None) -> Tensor:
        """[B, N, D] patch tokens to [B, N, 2] keep logits."""
        return torch.rand(*patches.shape[:2], 2, device=patches.device, dtype=patches.dtype)


class ClassAttention(nn.Module):
    """How much the class token attends to each patch, mean over the heads.

    The score of EViT (Liang et al., 2022, section 3.2), but from the block before the stage. Reads
    the output of that block's `qkv`.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.heads = int(attention.num_heads)  # type: ignore[arg-type]
        self.qkv: Tensor | None = None
        attention.qkv.register_forward_hook(self._record_qkv)  # type: ignore[operator, union-attr]

    def _record_qkv(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.qkv = output.detach()

    def forward(self, patches: Tensor, policy: Tensor | None = None) -> Tensor:
        """[B, N, D] patch tokens to [B, N, 2] keep logits."""
        if self.qkv is None or self.qkv.shape[1] != patches.shape[1] + 1:
            raise RuntimeError("the block before the stage has not run on these tokens")
        batch, length, _ = self.qkv.shape
        query, key, _ = self.qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = (query[:, :, :1] * key).sum(-1) * key.shape[-1] ** -0.5
        weight = logits.softmax(-1).mean(1)[:, 1:]
        self.qkv = None
        return torch.stack([weight.log(), torch.zeros_like(weight)], dim=-1)


class BaselineTrainer(ImageTrainer):
    """Trains a wrapped model on one path by the labels and the dense host's logits."""

    teacher: nn.Module
    distill: float

    def __init__(self, *args: object, path: ModelPath, **rest: object) -> None:
        self.eval_path = path
        super().__init__(*args, **rest)  # type: ignore[arg-type]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Cross entropy + `distill` times the divergence from the teacher."""
        images, target = self.mixing(inputs["pixel_values"], inputs["labels"])
        with self.accelerator.unwrap_model(model).using(path=self.eval_path):
            logits = class_logits(model(images), self.data.num_classes)
        with torch.no_grad():
            expected = class_logits(self.teacher(images), self.data.num_classes)
        loss = F.cross_entropy(logits, target) + self.distill * distill_logits(logits, expected)
        self._note({"total": loss.detach()})
        return loss
