"""What a short training is worth: 351 steps of 512 images, for several methods at the same ratios.

    python -m benchmarks.short_training --data FOLDER --host FILE

FOLDER holds the four idx files of Fashion-MNIST, FILE the dense host that `benchmarks.methods`
trained. Each arm is one training in an owner's own loop: cross entropy, half of the divergence from
the dense host's logits, five times the ratio loss; AdamW with a cosine, predictors at 1e-3.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

import tokenprune
from benchmarks.markdown import table
from tokenprune.cli.runs import host_of
from tokenprune.errors import PlanError
from tokenprune.losses.model_loss import ModelLoss
from tokenprune.recipe import load_recipe
from tokenprune.recipe.schema import LossSection
from tokenprune.train import DataBundle, build_host, evaluate, input_settings, load_data

ROOT = Path(__file__).parents[1]
RECIPE = "fashion-mnist-k0.7"
STEPS, BATCH, PREDICTOR_RATE = 351, 512, 1e-3
CALIBRATING = 1000
DENSE = {"version": 1, "mode": "merge", "schedule": {"keep_ratio": 1.0}}
LOSS = LossSection(ratio=5.0, distill_logits=0.5, distill_tokens=0.0)


class Arm(NamedTuple):
    """One training."""

    method: str
    counts: str
    noise: str
    host_rate: float

    @property
    def name(self) -> str:
        """As `--arms` takes it."""
        return "-".join(filter(None, (*self[:3], f"{self.host_rate:g}")))


ARMS = [
    Arm("dense", "", "", 1e-3),
    Arm("merge-k0.7", "", "", 1e-3),
    Arm("merge-k0.7", "", "", 1e-4),
    *(
        Arm("learned", counts, noise, rate)
        for rate in (1e-3, 1e-4)
        for counts in ("fixed", "free")
        for noise in ("spread", "random")
    ),
]
HEAD = """# What a short training is worth

{steps} steps of {batch} images of Fashion-MNIST (three epochs), seed {seed}: the small LV-ViT of
`benchmarks.methods` ({dense:.2f} % of 10,000 test images without pruning), stages at blocks 3, 6
and 9. Cross entropy, half of the divergence from the dense host's logits, five times the ratio
loss; AdamW with a cosine, predictors at {rate:g}. One thread each on two shared CPU cores. Made by

    python -m benchmarks.short_training --data FOLDER --host FILE

*Free* counts draw each token on its own (DynamicViT), *fixed* ones keep as many as eval does
(`sampling.counts`). *Spread* noise is the same in training and eval (`sampling.noise`); `random`
noise is there in training only. *Before* is the wrapped model that nobody has trained; *per image*
is after training, with the threshold at which {calibrating} training images cost on average what
fixed counts cost.

{rows}
"""


def wrapped(host: nn.Module, arm: Arm) -> Any:
    """The host, pruned as an arm says; `dense` runs the whole host, for comparison."""
    if arm.method == "dense":
        return tokenprune.wrap(host, DENSE, verify=False)
    if arm.method != "learned":
        return tokenprune.wrap(host, arm.method, verify=False)
    mapping = load_recipe(RECIPE).model_dump(mode="json", exclude_none=True)
    mapping["sampling"] |= {"counts": arm.counts, "noise": arm.noise}
    return tokenprune.wrap(host, mapping, verify=False)


def run(arm: Arm, host: nn.Module, data: DataBundle, seed: int) -> dict[str, Any]:
    """Train one arm; its figures."""
    teacher = copy.deepcopy(host)
    dense = evaluate(host, data, "dense")
    torch.manual_seed(seed)
    model = wrapped(host, arm)
    before = evaluate(model, data)
    predictors = list(model.token_predictors.parameters())
    own = {id(parameter) for parameter in predictors}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": arm.host_rate}]
    groups += [{"params": predictors, "lr": PREDICTOR_RATE}] * bool(predictors)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )
    loss = ModelLoss(model, LOSS, teacher)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(data.train, BATCH, shuffle=True, drop_last=True, generator=generator)
    started, step = time.perf_counter(), 0
    model.train()
    while step < STEPS:
        for batch in loader:
            images = batch["pixel_values"]
            output, trace = model(images, return_trace=True)
            total, parts = loss(images, output, batch["labels"], trace)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 25 == 0:
                print(arm.name, step, {k: round(float(v), 3) for k, v in parts.items()}, flush=True)
            if step == STEPS:
                break
    minutes = (time.perf_counter() - started) / 60
    figures = {"before": before, "after": evaluate(model.eval(), data), "dense": dense}
    figures |= {"macs": tokenprune.profile(model).ratio, "per_image": None}
    if arm.method == "learned":
        images = torch.stack([data.train[n]["pixel_values"] for n in range(CALIBRATING)])
        try:
            model.set_budget(macs=figures["macs"], images=images)
            figures["per_image"] = evaluate(model, data)
        except PlanError as error:
            print(arm.name, error)
    return {**arm._asdict(), "seed": seed, **figures, "minutes": minutes}


def as_page(rows: list[dict[str, Any]]) -> str:
    """docs/short_training.md."""
    head = ["method", "counts", "noise", "rate of the host", "MACs", "lost before", "lost after"]
    head += ["lost, per image", "minutes"]
    cells = []
    for row in rows:
        measured = (row["before"], row["after"], row["per_image"])
        lost = ["-" if m is None else f"{100 * (row['dense'] - m):.2f}" for m in measured]
        how = [row["method"], row["counts"], row["noise"], f"{row['host_rate']:g}"]
        cells.append([*how, f"{row['macs']:.2f}", *lost, f"{row['minutes']:.0f}"])
    facts = {"dense": 100 * rows[0]["dense"], "seed": rows[0]["seed"], "rate": PREDICTOR_RATE}
    facts["calibrating"] = CALIBRATING
    return HEAD.format(steps=STEPS, batch=BATCH, rows=table(head, cells), **facts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--host", type=Path, required=True, help="weights of the dense host")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = load_recipe(RECIPE)
    settings = input_settings(host_of(recipe), recipe.train.image_size)
    data = load_data(options.data, **settings, train=recipe.train)
    file = options.docs / "short_training.json"
    for arm in [arm for arm in ARMS if arm.name in options.arms]:
        host = build_host(host_of(recipe), data.num_classes, in_chans=data.in_chans)
        host.load_state_dict(load_file(options.host))
        row = run(arm, host.eval(), data, options.seed)
        known = json.loads(file.read_text()) if file.exists() else []
        same = ("method", "counts", "noise", "host_rate", "seed")
        rows = [old for old in known if any(old[key] != row[key] for key in same)] + [row]
        file.write_text(json.dumps(rows, indent=1) + "\n")
        (options.docs / "short_training.md").write_text(as_page(rows))


if __name__ == "__main__":
    main()
