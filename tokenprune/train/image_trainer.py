"""Base of dense and pruned training: batch order, learning rates, weight average, resume."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tokenprune.checkpoints.directory import describe_weights
from tokenprune.losses.logits import class_logits
from tokenprune.recipe.schema import TrainSection
from tokenprune.rewrite.settings import Path as ModelPath
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.train.arguments import Progress
from tokenprune.train.average import WeightAverage
from tokenprune.train.data import DataBundle
from tokenprune.train.evaluation import score
from tokenprune.train.folders import DataError
from tokenprune.train.images import EpochView
from tokenprune.train.mixing import Mixing, criterion
from tokenprune.train.optim import Schedule, frozen_names, make_optimizer, make_scheduler
from tokenprune.train.order import EpochBatches
from tokenprune.train.run_folder import mark_whole, unmark

__all__ = ["ImageTrainer"]

WEIGHTS = "model.safetensors"
AVERAGE = "average.safetensors"


class ImageTrainer(Trainer):
    """Trains a dense host by cross entropy; base of `PruningTrainer`.

    `transformers.Trainer` runs the loop. Items are `{"pixel_values", "labels"}`: images go to
    the first argument of the host's forward, and `class_logits` finds the logits in its output, so
    models of timm and transformers are trained in the same way.
    """

    eval_path: ModelPath = "dense"
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: DataBundle,
        config: TrainSection,
        *,
        progress: Progress | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """Prepare a run; epochs and batch size are those of `config`."""
        if not len(data.eval):  # type: ignore[arg-type]
            raise DataError(f"{data.name or 'The data'} has no image to evaluate on. Add some.")
        host_config = getattr(model, "config", None)
        before = {} if host_config is None else dict(vars(host_config))
        super().__init__(
            model, args, train_dataset=data.train, eval_dataset=data.eval, callbacks=callbacks
        )
        if host_config is not None:  # Trainer writes `use_cache` into it
            vars(host_config).clear()
            vars(host_config).update(before)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Hooks(self, progress))
        # the loss is a mean over images, so Trainer must divide it by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self.data, self.config = data, config
        self.images = EpochView(data.train)
        self.order = EpochBatches(
            len(self.images),
            config.batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            rank=args.process_index,
            num_ranks=args.world_size,
            seed=config.seed,
        )
        self.mixing = Mixing(config, data.num_classes)
        self.criterion = criterion(config)
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self._parts: dict[str, Tensor] = {}
        self._passes = 0

    # ---- the run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run or resume; see `transformers.Trainer.train`. At the end the model holds the averaged
        weights if there is an average.

        The random state of dropout and mixing differs between ranks.
        """
        rank_seed = np.random.SeedSequence((self.config.seed, self.args.process_index))
        with self._frozen():
            first, second = (int(word) for word in rank_seed.generate_state(2))
            np.random.seed(first)
            torch.manual_seed(second)
            result = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.copy_to(self.model)
        for name in ("forward", "_original_forward"):  # accelerate's, for mixed precision
            self.model.__dict__.pop(name, None)
        return result

    def final_scores(self) -> dict[str, float]:
        """`accuracy` and `loss` on the held-out images, after training."""
        last = next((e for e in reversed(self.state.log_history) if "eval_accuracy" in e), None)
        if last is None or last["step"] != self.state.global_step:
            last = self.evaluate()
        return {"accuracy": last["eval_accuracy"], "loss": last["eval_loss"]}

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        names = frozen_names(self.model, self.config.frozen_parameters)
        if self.args.world_size > 1:
            names |= self._idle_names()
        frozen = [p for n, p in self.model.named_parameters() if n in names and p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _idle_names(self) -> set[str]:
        """Parameters without a gradient, such as a mask token: DDP would wait for it forever."""
        self.model.train()
        items = [self.images[index] for index in range(min(2, len(self.images)))]
        with self.accelerator.autocast():
            self.compute_loss(self.model, self._prepare_inputs(default_collate(items))).backward()
        idle = {name for name, p in self.model.named_parameters() if p.grad is None}
        self.model.zero_grad()
        self._parts, self._passes = {}, 0
        return idle

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of `EpochBatches`."""
        return DataLoader(
            self.images,
            batch_sampler=self.order,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the recipe's parameter groups."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.config)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Warm-up, cosine decay, and the host frozen in the first epochs."""
        if self.lr_scheduler is None:
            schedule = Schedule.of(self.config, num_training_steps)
            self.lr_scheduler = make_scheduler(optimizer or self.optimizer, schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- loss and evaluation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy of a batch, after mixing if the recipe has any."""
        images, target = self.mixing(inputs["pixel_values"], inputs["labels"])
        logits = class_logits(model(images), self.data.num_classes)
        loss = self.criterion(logits.float(), target)
        self._note({"classification": loss.detach()})
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Accuracy and cross entropy, each rank on its share; of the averaged weights if kept."""
        images: Any = self.data.eval if eval_dataset is None else eval_dataset
        share = range(self.args.process_index, len(images), self.args.world_size)
        average = self.average if self.is_in_train else None
        own, workers = (0.0, 0.0, 0.0), self.args.dataloader_num_workers
        with average.inside(self.model) if average else nullcontext():
            if share:
                own = score(
                    self.model, images, share, self.data.num_classes, self.eval_path, 256, workers
                )
        sums = torch.tensor(own, device=self.args.device)
        correct, loss, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {
            f"{metric_key_prefix}_accuracy": correct / count,
            f"{metric_key_prefix}_loss": loss / count,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _note(self, parts: dict[str, Tensor]) -> None:
        """Add up parts of the loss until the next log."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().float()
        self._passes += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each part of the loss since the last log, over all ranks."""
        if "loss" in logs and self._passes:
            means = torch.stack(list(self._parts.values())) / self._passes
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= dict(zip(self._parts, means.tolist(), strict=True))
            self._parts, self._passes = {}, 0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here; see `tokenprune.profile`."""
        return 0

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unmark(checkpoint)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(checkpoint)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # the same for all hosts: save_pretrained would put predictors into the host's checkpoint
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            save_model(self.model, str(folder / WEIGHTS))
            if isinstance(self.model, PrunedModel):  # so that tokenprune.load reads it
                describe_weights(pruning_of(self.model), folder)
            if self.average is not None:
                self.average.save(folder / AVERAGE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        load_model(self.model, folder / WEIGHTS)
        if self.average is not None:
            self.average.load(folder / AVERAGE)


class _Hooks(TrainerCallback):
    """Callbacks: sampler epoch, EMA, progress."""

    def __init__(self, trainer: ImageTrainer, progress: Progress | None) -> None:
        self.trainer, self.progress = trainer, progress
        self.latest: dict[str, float] = {}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.order.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model)
        if self.progress is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, dict(self.latest))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        self.latest |= logs or {}
