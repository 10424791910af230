"""Accuracy on Fashion-MNIST: a dense host, pruned at five ratios, against baselines.

    python -m benchmarks.accuracy --data FOLDER                 all of it, some hours on two cores
    python -m benchmarks.accuracy --data FOLDER --minutes 60    an hour of it; repeat to resume
    python -m benchmarks.accuracy --data FOLDER --arms random   some arms, next to another process;
                                                                also --ratios
    python -m benchmarks.accuracy --data FOLDER --render-only   write docs/accuracy.* again

FOLDER holds the four idx files of Fashion-MNIST. Finished trainings are kept in --work and skipped.
Learned predictors are trained by the command `tokenprune train`, which resumes an interrupted
training.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import tokenprune
from benchmarks.accuracy_parts.baselines import BaselineTrainer, ClassAttention, RandomScores
from benchmarks.accuracy_parts.page import as_page, draw
from benchmarks.accuracy_parts.result import Result, Task
from tokenprune.cli.runs import host_of
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.runtime.model import pruning_of
from tokenprune.train import DataBundle, build_host, evaluate, input_settings, load_data, pretrain
from tokenprune.train.arguments import training_arguments
from tokenprune.train.fitting import run_trainer
from tokenprune.train.trainer import frozen_copy

__all__ = ["main", "tasks"]

ROOT = Path(__file__).parents[1]
RECIPE = "fashion-mnist-k0.7"
DENSE_EPOCHS = 8
DENSE_BATCH = 64
DENSE_RATE = 2e-3
RATIOS = (0.7, 0.5, 0.9, 0.8, 0.6)
# In the order of training: those of the bars first.
ARMS = ("learned", "random", "no distillation", "class attention")
DISTILL = 0.5  # of the logits; the recipe's weight, so that arms differ in the selection only
# Minutes of one training on two cores, until some are measured.
GUESS = {"dense": 30.0, "learned": 7.0, "no distillation": 6.0}


def tasks(seeds: Sequence[int]) -> Iterator[Task]:
    """All trainings, seed by seed."""
    for seed in seeds:
        yield Task(seed, "dense", 1.0)
        yield Task(seed, "dense longer", 1.0)
        for arm, ratio in product(ARMS, RATIOS):
            yield Task(seed, arm, ratio)


class Bench:
    """The trainings of a work folder."""

    def __init__(self, data: str, work: Path) -> None:
        self.folder, self.work = data, work
        work.mkdir(parents=True, exist_ok=True)
        self.path = work / "results.jsonl"
        self._check_recipe()
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = [Result(**json.loads(line)) for line in lines]
        self.results = {result.task: result for result in found}
        self._data: DataBundle | None = None

    def _check_recipe(self) -> None:
        """Refuse to mix results of different recipes in one table."""
        current = f"# dense: {DENSE_EPOCHS} epochs, batch {DENSE_BATCH}, rate {DENSE_RATE}\n"
        current += load_recipe(RECIPE).to_yaml()
        saved = self.work / "recipe.yaml"
        if not self.path.exists():
            saved.write_text(current)
        elif not saved.exists() or saved.read_text() != current:
            raise SystemExit(
                f"{self.work} holds trainings of another {RECIPE} ({saved}). Give another --work."
            )

    def recipe(self, task: Task) -> Recipe:
        """The shipped recipe at a ratio and seed, with the losses of an arm."""
        recipe = load_recipe(RECIPE)
        mapping: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
        mapping |= {"name": task.name, "stages": None}
        mapping["schedule"]["keep_ratio"] = task.keep_ratio
        mapping["train"]["seed"] = task.seed
        if task.arm == "no distillation":
            mapping["loss"] |= {"distill_logits": 0.0, "distill_tokens": 0.0}
        mapping = {key: value for key, value in mapping.items() if value is not None}
        return Recipe.parse(mapping, f"{RECIPE} for {task.name}")

    def data(self, recipe: Recipe) -> DataBundle:
        """Fashion-MNIST, prepared for the host."""
        if self._data is None:
            settings = input_settings(host_of(recipe), recipe.train.image_size)
            self._data = load_data(self.folder, **settings, train=recipe.train)
        return self._data

    def run(self, task: Task) -> Result:
        """Train, evaluate, and save the figures."""
        started = time.perf_counter()
        recipe = self.recipe(task)
        data = self.data(recipe)
        if task.arm == "dense":
            model, epochs = self._dense(task, recipe, data), DENSE_EPOCHS
        elif task.arm in ("learned", "no distillation"):
            model, epochs = self._learned(task, recipe, data), recipe.train.epochs
        else:
            model, epochs = self._baseline(task, recipe, data), recipe.train.epochs
        counted = tokenprune.profile(model)
        dense = task.arm.startswith("dense")
        result = Result(
            *(task.seed, task.arm, task.keep_ratio),
            accuracy=evaluate(model, data, "dense" if dense else "gather"),
            gmacs=counted.dense_gmacs if dense else counted.gmacs,
            tokens=() if dense else pruning_of(model).budget.counts(counted.patches_per_stage),
            epochs=epochs,
            images=len(data.train),  # type: ignore[arg-type]
            minutes=(time.perf_counter() - started) / 60,
        )
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        self.results[task] = result
        return result

    def weights(self, seed: int) -> Path:
        """File of the dense host's weights."""
        return self.work / f"dense-seed{seed}.safetensors"

    def _host(self, recipe: Recipe, data: DataBundle) -> nn.Module:
        torch.manual_seed(recipe.train.seed)
        return build_host(host_of(recipe), data.num_classes, in_chans=data.in_chans)

    def _dense(self, task: Task, recipe: Recipe, data: DataBundle) -> nn.Module:
        host = self._host(recipe, data)
        pretrain(
            host,
            data,
            DENSE_EPOCHS,
            batch_size=DENSE_BATCH,
            learning_rate=DENSE_RATE,
            warmup_epochs=1,
            seed=task.seed,
        )
        save_file(host.state_dict(), self.weights(task.seed))
        return tokenprune.wrap(host, recipe)

    def _learned(self, task: Task, recipe: Recipe, data: DataBundle) -> nn.Module:
        file, folder = self.work / f"{task.name}.yaml", self.work / task.name
        file.write_text(recipe.to_yaml())
        line = ["train", str(file), "--data", self.folder, "--output", str(folder)]
        line += ["--host-weights", str(self.weights(task.seed))]
        subprocess.run([sys.executable, "-m", "tokenprune", *line], check=True)
        found: nn.Module = tokenprune.load(folder, self._host(recipe, data))
        return found

    def _baseline(self, task: Task, recipe: Recipe, data: DataBundle) -> nn.Module:
        host = self._host(recipe, data)
        host.load_state_dict(load_file(self.weights(task.seed)))
        model = tokenprune.wrap(host, recipe)
        teacher = frozen_copy(model)
        if task.arm != "dense longer":
            _replace_predictors(task.arm, model)
        arguments = training_arguments(
            recipe.train,
            self.work / task.name,
            num_images=len(data.train),  # type: ignore[arg-type]
            save_every="never",
            evaluates=False,
        )
        path = "dense" if task.arm == "dense longer" else "gather"
        trainer = BaselineTrainer(model, arguments, data, recipe.train, path=path)
        with teacher.using(path="dense"):
            trainer.teacher, trainer.distill = teacher, DISTILL
            run_trainer(trainer)
        return model


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _options(arguments)
    echo = Console().print
    bench = Bench(options.data, options.work)
    todo = [task for task in tasks(range(options.seeds)) if task not in bench.results]
    todo = [task for task in todo if task.arm in options.arms and not options.render_only]
    todo = [task for task in todo if task.keep_ratio in (*options.ratios, 1.0)]
    echo(f"{len(bench.results)} trainings done, {len(todo)} to do, {_estimate(todo, bench)}")
    started = time.perf_counter()
    for task in todo:
        result = bench.run(task)
        echo(
            f"{task.name}: {result.accuracy:.2%}, {result.gmacs:.5f} GMACs, "
            f"{result.minutes:.1f} min; left: {_estimate(todo[todo.index(task) + 1 :], bench)}"
        )
        if (time.perf_counter() - started) / 60 > options.minutes:
            echo("time is up; resume with the same command")
            break
    bench = Bench(options.data, options.work)  # with the results of other processes
    results = sorted(bench.results.values(), key=lambda result: result.task)
    (options.docs / "accuracy.json").write_text(
        json.dumps([asdict(result) for result in results], indent=1) + "\n"
    )
    draw(results, options.docs / "accuracy.png")
    (options.docs / "accuracy.md").write_text(as_page(results))
    echo(f"wrote {options.docs}/accuracy.md, .json and .png")


def _replace_predictors(arm: str, model: nn.Module) -> None:
    """Replace the predictors by the scores of an arm."""
    blocks: Any = model.get_submodule("blocks")
    predictors: Any = model.token_predictors
    for stage, block in enumerate(pruning_of(model).plan.blocks):
        before = blocks[block - 1].attn
        predictors[stage] = RandomScores() if arm == "random" else ClassAttention(before)


def _estimate(todo: Sequence[Task], bench: Bench) -> str:
    known: dict[str, list[float]] = {}
    for result in bench.results.values():
        known.setdefault(result.arm, []).append(result.minutes)
    minutes = sum(
        sum(known[task.arm]) / len(known[task.arm])
        if task.arm in known
        else GUESS.get(task.arm, 5.0)
        for task in todo
    )
    return f"about {minutes:.0f} min"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="trained so far")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    every = ("dense", "dense longer", *ARMS)
    parser.add_argument("--arms", nargs="+", choices=every, default=every, help="to run")
    parser.add_argument(
        "--ratios", nargs="+", type=float, choices=RATIOS, default=RATIOS, help="to run"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none later")
    parser.add_argument("--render-only", action="store_true", help="train nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
