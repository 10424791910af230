"""How close the library is to DynamicViT: writes docs/fidelity.md.

    python -m benchmarks.fidelity                  the training part, about two minutes
    python -m benchmarks.fidelity --cases cases    the eval part too; see benchmarks.official_cases

A part that is not measured keeps its figures in the document.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import put, table
from benchmarks.training_parity import leaks, parities, survivals
from tokenprune.checkpoints.dynamicvit import convert_dynamicvit

__all__ = ["main"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "fidelity.md"
HOSTS = (
    "deit-256",
    "deit-small",
    "deit-base",
    "lvvit-s",
    "lvvit-m",
    "swin-tiny",
    "swin-small",
    "swin-base",
)
BOUND = 1e-4


def eval_part(folder: Path) -> str:
    """Every case in a folder, converted and run."""
    rows, worst = [], 0.0
    for host in HOSTS:
        for path in sorted(folder.glob(f"{host}-b*.pt")):
            row, difference = _case(path)
            worst = max(worst, difference)
            rows.append(row)
            print(" ".join(row), file=sys.stderr, flush=True)
    if not rows:
        raise SystemExit(f"no cases in {folder}; benchmarks.official_cases writes them")
    if worst > BOUND:
        raise SystemExit(f"a logit differs by {worst:.1e}, more than {BOUND:.0e}")
    head = ["model", "batch", "kept", "largest logit difference", "spread of logits", "kept sets"]
    return f"{table(head, rows)}\n\nWorst: {worst:.1e}; the bound is {BOUND:.0e}."


def _case(path: Path) -> tuple[list[str], float]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        case: dict[str, Any] = torch.load(path, weights_only=True)["case"]
    done = convert_dynamicvit(path)
    with torch.no_grad():
        logits, trace = done.build()(case["images"], return_trace=True)
    difference = float((logits - case["logits"]).abs().max())
    same = [
        torch.equal(stage.keep_indices, kept)
        for stage, kept in zip(trace.stages, case["keep_indices"], strict=True)
    ]
    row = [
        done.host,
        str(len(logits)),
        " ".join(str(stage.num_tokens) for stage in trace.stages),
        f"{difference:.1e}",
        f"{case['logits'].std():.2f}",
        "equal" if all(same) else f"{same.count(False)} of {len(same)} differ",
    ]
    return row, difference


def parity_part() -> str:
    """Loss parts and gradients at fresh weights."""
    head = [
        "model",
        "formulas",
        "loss parts",
        "predictor gradient",
        "without the ratio term",
        "cosine",
    ]
    rows = [
        [
            row.model,
            row.form,
            f"{row.parts:.1e}",
            f"{row.gradient:.1e}",
            f"{row.without_ratio:.1e}",
            f"{row.cosine:.7f}",
        ]
        for row in parities()
    ]
    return table(head, rows)


def leak_part() -> str:
    """How much the published softmax leaks."""
    head = [
        "weights",
        "mass on dropped keys, mean",
        "largest",
        "train - eval, published",
        "train - eval, ours",
        "gradient norm, published / ours",
    ]
    rows = [
        [
            f"x{row.factor}",
            f"{100 * row.mass[0]:.2g} %",
            f"{100 * row.mass[1]:.2g} %",
            f"{row.published:.1e}",
            f"{row.ours:.1e}",
            f"{row.norm:.3g}",
        ]
        for row in leaks()
    ]
    return table(head, rows)


def survival_part() -> str:
    """Batches with a finite loss and gradient at low keep probabilities."""
    rows = survivals()
    head = [
        "keep probability",
        "batches with an image left empty",
        "NaN or inf, published",
        "NaN or inf, ours",
    ]
    cells = [
        [f"{row.probability:g}"]
        + [f"{n} of {row.of}" for n in (row.empty, row.published, row.ours)]
        for row in rows
    ]
    return table(head, cells)


def main() -> None:
    """Measure, and put the figures into the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, help="folder that benchmarks.official_cases wrote")
    parser.add_argument("--eval-only", action="store_true", help="leave the training part")
    options = parser.parse_args()
    if options.cases is not None:
        put(DOCUMENT, "eval", eval_part(options.cases))
    if not options.eval_only:
        for part, measure in {
            "parity": parity_part,
            "leak": leak_part,
            "survival": survival_part,
        }.items():
            print(f"measuring {part}", file=sys.stderr, flush=True)
            put(DOCUMENT, part, measure())


if __name__ == "__main__":
    main()
