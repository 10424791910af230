"""`PruningTrainer`: trains predictors and host, with the dense host as teacher."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from tokenprune.errors import PlanError
from tokenprune.losses import ModelLoss
from tokenprune.losses.logits import class_logits
from tokenprune.recipe import Recipe
from tokenprune.rewrite.settings import Path as ModelPath
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.train.arguments import Progress
from tokenprune.train.data import DataBundle
from tokenprune.train.image_trainer import ImageTrainer
from tokenprune.wrapping import wrap

__all__ = ["PruningTrainer", "frozen_copy"]


class PruningTrainer(ImageTrainer):
    """`transformers.Trainer` for a wrapped model.

    The student runs the path its method trains on: the mask path with Gumbel noise where scores are
    learned, else the one that eval runs. The teacher is a frozen copy of the host, run dense.
    Logged beside `loss`: each part by the name of its weight in the recipe, unweighted, and
    `kept_share_<stage>`. Evaluation runs the gather path.

    Every rank has its own generator of the noise; its state is in every checkpoint.
    """

    eval_path: ModelPath = "gather"

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: DataBundle,
        *,
        recipe: Recipe | None = None,
        teacher: nn.Module | None = None,
        progress: Progress | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            model: what `wrap` returned; trained in place.
            args: what `training_arguments` returned.
            data: images.
            recipe: its `loss` and `train` sections are used; the model's own if None.
            teacher: a host, or a wrapped model, that runs dense; a frozen copy of `model` if None.
            progress: called after each step with (step, total steps, latest logs).
            callbacks: additional ones.

        Raises:
            NotWrappedError: `model` is not wrapped.
            PlanError: the model's stages are not the recipe's.
        """
        pruning = pruning_of(model)
        recipe = recipe or pruning.recipe
        stages = tuple(stage.block for stage in recipe.resolved_stages)
        if stages != pruning.plan.blocks:
            raise PlanError(
                f"The recipe prunes before blocks {list(stages)}, the model was wrapped to prune "
                f"before {list(pruning.plan.blocks)}. Wrap the host with the recipe that trains it."
            )
        super().__init__(model, args, data, recipe.train, progress=progress, callbacks=callbacks)
        distills = recipe.loss.distill_logits or recipe.loss.distill_tokens
        self.teacher = frozen_copy(model, teacher).to(args.device) if distills else None
        self.loss = ModelLoss(model, recipe.loss, self.teacher, self.criterion)
        self.noise = torch.Generator(args.device)
        seed = np.random.SeedSequence((self.config.seed, args.process_index, len("noise")))
        self.noise.manual_seed(int(seed.generate_state(1, np.uint64)[0]) % 2**63)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted parts of `PruningLoss` on a batch."""
        images, target = self.mixing(inputs["pixel_values"], inputs["labels"])
        student: PrunedModel = self.accelerator.unwrap_model(model)
        path = pruning_of(student).method.path(training=True)
        with student.using(path=path, generator=self.noise):
            output, trace = model(images, return_trace=True)
        logits = class_logits(output, self.data.num_classes)
        with self.accelerator.autocast():
            loss, parts = self.loss(images, output, target, trace)
        decisions = enumerate(stage.decision for stage in trace.stages)
        shares = {f"kept_share_{s}": decision.detach().mean() for s, decision in decisions}
        self._note({**parts, **shares})
        return (loss, {"logits": logits}) if return_outputs else loss

    # ---- checkpoints

    def _noise_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"noise_{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_file({"noise": self.noise.get_state()}, self._noise_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self.noise.set_state(load_file(self._noise_file(checkpoint))["noise"])


def frozen_copy(model: nn.Module, teacher: nn.Module | None = None) -> PrunedModel:
    """A frozen copy in eval mode of `teacher` (a host or a wrapped model), or of `model`."""
    frozen = copy.deepcopy(model if teacher is None else teacher)
    if not isinstance(frozen, PrunedModel):
        frozen = wrap(frozen, pruning_of(model).recipe, verify=False, train=False)
    return frozen.eval().requires_grad_(False)
