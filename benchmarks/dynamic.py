"""Jagged pruning by a threshold against fixed counts: accuracy and speed at the same mean cost.

    python -m benchmarks.dynamic                          trains on scikit-learn's digits first
    python -m benchmarks.dynamic --checkpoint FOLDER      what `tokenprune train` wrote; several
    python -m benchmarks.dynamic --render-only            write docs/dynamic.md again

Every checkpoint is evaluated at several thresholds, and at fixed counts that cost the same on
average; speed is measured interleaved with the dense host. docs/dynamic.json holds one entry per
checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenprune
from benchmarks.markdown import table
from tokenprune.checkpoints.directory import save
from tokenprune.cli.run_input import write_input
from tokenprune.cli.runs import prepare, reopen
from tokenprune.cost.timing import interleaved
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.runtime.model import pruning_of
from tokenprune.train import DataBundle, evaluate, fit, kept_tokens, pretrain

__all__ = ["main"]

DOCS = Path(__file__).parents[1] / "docs"
RECIPE = "demo-digits-k0.7"
# Keep probabilities; skipped where the last stage keeps almost no or almost all tokens.
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 0.95)
HEAD = """
# Jagged pruning: images that keep different numbers of tokens

With `sampling.selection: threshold` (or `model.set_threshold`) each image keeps the tokens whose
keep probability is above a threshold. The tables compare that with fixed counts of the same model
at the same mean cost. Costs count each image alone (`tokenprune.ImageMacs`), without padding.
The bound is the speed-up if time were proportional to the mean cost; attention of single images,
packing and the predictors' small layers keep it from being reached.
"""


def trained(work: Path, dense_epochs: int, epochs: int) -> Path:
    """A checkpoint on digits, trained with the ratio loss of the batch mean."""
    folder = work / f"checkpoint-{dense_epochs}-{epochs}"
    if (folder / "recipe.yaml").exists():
        return folder
    mapping = load_recipe(RECIPE).model_dump(mode="json", exclude_none=True)
    mapping["loss"]["ratio_per_image"] = False
    recipe = Recipe.parse({**mapping, "name": f"{RECIPE}-free"})
    run = prepare(recipe, None, pretrained=False)
    pretrain(run.model, run.data, dense_epochs, seed=recipe.train.seed)
    model = tokenprune.wrap(run.model, recipe)
    fit(None, model, run.data, work / "training", epochs=epochs, resume=False, save_every="never")
    folder = save(model, folder)
    write_input(folder, None, run)
    return folder


def same_cost(costs: tokenprune.ImageMacs, counts: Tensor, patches: tuple[int, ...]) -> list[int]:
    """Fixed counts in the proportions of the means, whose cost is nearest to the mean cost."""
    target, means = float(costs(counts).mean()), counts.double().mean(0)
    most = torch.tensor(patches, dtype=torch.float64)
    choices = {
        tuple((means * factor / 200).round().clamp_min(1).minimum(most).int().tolist())
        for factor in range(160, 260)
    }
    return list(min(choices, key=lambda c: abs(float(costs(torch.tensor([c]))) - target)))


def accuracies(model: Any, data: DataBundle) -> list[dict[str, Any]]:
    """Accuracy and cost of each threshold, and of fixed counts at the same cost."""
    costs = tokenprune.ImageMacs(model)
    patches = tokenprune.profile(model).patches_per_stage
    rows = []
    for threshold in THRESHOLDS:
        model.set_threshold(threshold)
        accuracy, counts = evaluate(model, data), kept_tokens(model, data)
        mean = counts.double().mean(0)
        if not 1.5 < float(mean[-1]) < 0.98 * patches[-1]:
            continue
        macs = costs(counts)
        fixed = same_cost(costs, counts, patches)
        model.set_threshold(None)
        model.set_keep_ratio([k / n for k, n in zip(fixed, patches, strict=True)])
        rows.append(
            {
                "threshold": threshold,
                "images": len(counts),
                "accuracy": accuracy,
                "macs": float(macs.mean()),
                "cheapest": float(macs.quantile(0.1)),
                "dearest": float(macs.quantile(0.9)),
                "kept": mean.tolist(),
                "fixed": fixed,
                "fixed_accuracy": evaluate(model, data),
                "fixed_macs": float(costs(torch.tensor([fixed]))),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def speeds(model: Any, images: Tensor, row: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Dense host, fixed counts and the threshold, interleaved."""
    costs, pruning = tokenprune.ImageMacs(model), pruning_of(model)
    patches = tokenprune.profile(model).patches_per_stage
    host = tokenprune.unwrap(model).eval()
    model.set_threshold(None)
    model.set_keep_ratio([k / n for k, n in zip(row["fixed"], patches, strict=True)])
    fixed = pruning.budget
    by_threshold = fixed.with_threshold(row["threshold"])

    def running(budget: Any) -> Any:
        def run() -> Any:
            pruning.budget = budget
            return model(images)

        return run

    calls = {
        "dense": lambda: host(images),
        "fixed": running(fixed),
        "threshold": running(by_threshold),
    }
    with torch.no_grad():
        pruning.budget = by_threshold
        _, trace = model(images, return_trace=True)
        timings = interleaved(calls, rounds=rounds)
    macs = float(costs(trace).mean())
    return {
        "batch": len(images),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "threshold": row["threshold"],
        "bound": costs.dense / macs,
        "fixed_bound": costs.dense / row["fixed_macs"],
        "milliseconds": {name: timing.seconds * 1e3 for name, timing in timings.items()},
        "spread": max(timing.spread for timing in timings.values()),
    }


def measured(folder: Path, data: str | None, batch: int, rounds: int) -> dict[str, Any]:
    """All figures of one checkpoint."""
    run = reopen(folder, data)
    model: Any = run.model.eval()
    dense, aim = evaluate(model, run.data, path="dense"), tokenprune.profile(model).macs
    rows = accuracies(model, run.data)
    middle = min(rows, key=lambda row: abs(row["macs"] - aim))
    size = min(batch, len(run.data.eval))  # type: ignore[arg-type]
    images = torch.stack([run.data.eval[i]["pixel_values"] for i in range(size)])
    return {
        "recipe": pruning_of(model).recipe.name,
        "per_image": pruning_of(model).recipe.loss.ratio_per_image,
        "images": len(run.data.eval),  # type: ignore[arg-type]
        "dense_accuracy": dense,
        "dense_macs": tokenprune.ImageMacs(model).dense,
        "rows": rows,
        "speed": speeds(model, images, middle, rounds),
    }


def as_page(found: dict[str, Any]) -> str:
    """docs/dynamic.md."""
    parts = [HEAD.strip()]
    for name, entry in found.items():
        parts.append(f"## {name}\n\n{_accuracy(entry)}\n\n{_speed(entry['speed'])}")
        parts.append(f"Measured with `{entry['command']}`.")
    return "\n\n".join(parts) + "\n"


def _accuracy(entry: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['threshold']:g}",
            " -> ".join(f"{kept:.1f}" for kept in row["kept"]),
            f"{row['macs'] / 1e6:.2f} ({row['cheapest'] / 1e6:.2f} to {row['dearest'] / 1e6:.2f})",
            f"{100 * row['accuracy']:.2f}",
            " -> ".join(map(str, row["fixed"])),
            f"{row['fixed_macs'] / 1e6:.2f}",
            f"{100 * row['fixed_accuracy']:.2f}",
        ]
        for row in entry["rows"]
    ]
    head = ["threshold", "mean tokens", "mean MMACs (10th to 90th percentile)", "accuracy, %"]
    head += ["fixed counts", "MMACs", "accuracy, %"]
    target = "each image" if entry["per_image"] else "the mean of a batch"
    return (
        f"{entry['images']} held-out images. Dense host: {entry['dense_macs'] / 1e6:.2f} MMACs, "
        f"{100 * entry['dense_accuracy']:.2f} %. Its ratio loss compared the kept share of "
        f"{target} with the recipe's ratios.\n\n{table(head, rows)}\n\n{_in_short(entry['rows'])}"
    )


def _in_short(rows: list[dict[str, Any]]) -> str:
    gaps = [100 * (row["accuracy"] - row["fixed_accuracy"]) for row in rows]
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    return (
        f"At the same cost the threshold is more accurate in {better} of {len(rows)} rows and less "
        f"in {worse}; {min(gaps):+.2f} to {max(gaps):+.2f} points, where one image is "
        f"{100 / rows[0]['images']:.2f}."
    )


def _speed(speed: dict[str, Any]) -> str:
    took = speed["milliseconds"]
    rows = [["dense", f"{took['dense']:.1f}", "", "", ""]]
    for name, called in (("fixed", "fixed counts"), ("threshold", "threshold")):
        gain = took["dense"] / took[name]
        bound = speed["fixed_bound" if name == "fixed" else "bound"]
        share = f"{100 * gain / bound:.0f} %"
        rows.append([called, f"{took[name]:.1f}", f"{gain:.2f}x", f"{bound:.2f}x", share])
    head = ["", "ms a batch", "speed-up", "bound (dense / mean MACs)", "reached"]
    return (
        f"Speed at batch {speed['batch']}, threshold {speed['threshold']:g}, CPU, "
        f"{speed['threads']} thread(s), medians of {speed['rounds']} interleaved rounds (one "
        f"differed from its median by up to {100 * speed['spread']:.0f} %):\n\n{table(head, rows)}"
    )


def main() -> None:
    """Measure, and write both documents."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, action="append", help="several are allowed")
    parser.add_argument("--data", help="folder of images; default: the training run's")
    parser.add_argument("--work", type=Path, default=Path("runs/dynamic"))
    parser.add_argument("--dense-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--render-only", action="store_true")
    given = parser.parse_args()
    figures = DOCS / "dynamic.json"
    found = json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}
    if not given.render_only:
        folders = given.checkpoint or [trained(given.work, given.dense_epochs, given.epochs)]
        for folder in folders:
            entry = measured(folder, given.data, given.batch, given.rounds)
            command = " ".join(["python -m benchmarks.dynamic", *sys.argv[1:]])
            found[entry["recipe"]] = {**entry, "command": command}
            figures.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (DOCS / "dynamic.md").write_text(as_page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
