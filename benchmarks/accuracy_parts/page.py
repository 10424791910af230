"""docs/accuracy.md and its curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.accuracy_parts.result import Result

__all__ = ["as_page", "draw"]

POINTS = 100
# (base ratio, largest loss in points, smallest saving in per cent)
BARS = ((0.7, 0.3, 31.0), (0.5, 1.0, 0.0))
HEAD = """# Accuracy on real images

Fashion-MNIST: 60,000 images to train on, 10,000 to test on, 28 x 28 pixels, ten classes; a small
LV-ViT of 12 blocks, 32 channels and 49 patch tokens (`recipes/fashion-mnist-k0.7.yaml`). The dense
host is trained once ({dense}); every other row starts from it and is
trained for {epochs} on all the images. Accuracy is measured on all test images, on the
gather path. One standard error of an accuracy of 90 % on 10,000 images is 0.3 points. Made by

    python -m benchmarks.accuracy --data FOLDER

- **learned**: `tokenprune train`, the four losses of DynamicViT.
- **no distillation**: the same with the labels and the ratio loss alone.
- **random**, **class attention**: no learned predictor; the same number of tokens is removed, at
  random, or those that the class token attends to least in the block before. The host is trained
  with this selection on the gather path, by the labels and the dense host's logits.
- **dense longer**: the dense host trained further in the same way, to separate pruning from more
  training.

Without any training: [methods](methods.md), for this host and a pretrained sentence embedder.
What few steps are worth, and an ablation of counts and noise: [short training](short_training.md).
A small Swin, windows against bypass: [windows](windows.md).
"""


def as_page(results: Sequence[Result]) -> str:
    """The document."""
    if not results:
        return "# Accuracy on real images\n\nNothing is measured yet.\n"
    parts = []
    for seed in sorted({result.seed for result in results if result.arm == "dense"}):
        parts.append(f"## Seed {seed}\n\n{_table([r for r in results if r.seed == seed])}")
    epochs = next((r.epochs for r in results if r.arm != "dense"), 0)
    dense = ", ".join(
        f"seed {r.seed}: {r.epochs} epochs, {r.accuracy:.2%}" for r in results if r.arm == "dense"
    )
    head = HEAD.format(dense=dense, epochs=f"{epochs} epoch{'s' if epochs > 1 else ''}")
    longer = {
        r.keep_ratio: (r.accuracy - other.accuracy) * POINTS
        for r, other in _against(results, "dense longer")
    }
    shown = ", ".join(f"{ratio}: {gap:+.2f}" for ratio, gap in sorted(longer.items(), reverse=True))
    against = f"Learned minus *dense longer*, in points by ratio: {shown}." if shown else ""
    spent = f"All trainings together took {sum(r.minutes for r in results) / 60:.1f} hours"
    spent += " on a core each (the dense one on two), next to other jobs."
    picture = "![accuracy against GMACs](accuracy.png)"
    return "\n".join(
        [head, "## Bars\n", _bars(results), "", against, spent, "", picture, "", *parts, ""]
    )


def _table(results: Sequence[Result]) -> str:
    (dense,) = [r for r in results if r.arm == "dense"]
    lines = ["| arm | keep | tokens | GMACs | saved | accuracy | minus dense, points | minutes |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in sorted(results, key=lambda r: (-r.keep_ratio, r.arm)):
        tokens = " -> ".join(map(str, r.tokens)) or "49"
        saved = f"{1 - r.gmacs / dense.gmacs:.1%}"
        gain = f"{(r.accuracy - dense.accuracy) * POINTS:+.2f}"
        lines.append(
            f"| {r.arm} | {r.keep_ratio} | {tokens} | {r.gmacs:.5f} | {saved} | "
            f"{r.accuracy:.2%} | {gain} | {r.minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _bars(results: Sequence[Result]) -> str:
    lines = ["| bar | measured | holds |", "|---|---|---|"]
    for ratio, most, least in BARS:
        pairs = [(r, d) for r, d in _against(results, "dense") if r.keep_ratio == ratio]
        if not pairs:
            lines.append(f"| keep {ratio} loses at most {most} points | not measured | - |")
            continue
        lost = mean((d.accuracy - r.accuracy) * POINTS for r, d in pairs)
        saved = mean((1 - r.gmacs / d.gmacs) * 100 for r, d in pairs)
        holds = "yes" if lost <= most and saved >= least else "**no**"
        wanted = f"keep {ratio} loses at most {most} points"
        wanted += f" at {least:.0f} % fewer GMACs or more" if least else ""
        lines.append(f"| {wanted} | {lost:+.2f} points lost, {saved:.1f} % fewer GMACs | {holds} |")
    gaps = {
        r.keep_ratio: (r.accuracy - other.accuracy) * POINTS
        for r, other in _against(results, "random")
    }
    shown = ", ".join(f"{ratio}: {gap:+.2f}" for ratio, gap in sorted(gaps.items(), reverse=True))
    beaten = ("yes" if min(gaps.values()) > 0 else "**no**") if gaps else "-"
    measured = f"points above, by ratio: {shown}" if shown else "not measured"
    lines.append(f"| learned beats random at every ratio | {measured} | {beaten} |")
    return "\n".join(lines)


def _against(results: Sequence[Result], arm: str) -> list[tuple[Result, Result]]:
    """Pairs of a learned row and the row of `arm` that it is compared with."""
    return [
        (r, other)
        for r in results
        for other in results
        if r.arm == "learned"
        and (other.arm, other.seed) == (arm, r.seed)
        and (arm.startswith("dense") or other.keep_ratio == r.keep_ratio)
    ]


def draw(results: Sequence[Result], file: Path) -> None:
    """Accuracy against GMACs, a line for each arm, mean over the seeds."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for arm in dict.fromkeys(r.arm for r in results):
        own = [r for r in results if r.arm == arm]
        ratios = sorted({r.keep_ratio for r in own})
        groups = [[r for r in own if r.keep_ratio == ratio] for ratio in ratios]
        across = [mean(r.gmacs for r in group) for group in groups]
        up = [mean(r.accuracy for r in group) * POINTS for group in groups]
        axes.plot(across, up, marker="o", label=arm)
    axes.set_xlabel("GMACs of an image")
    axes.set_ylabel("accuracy on the test images, %")
    axes.set_title("Fashion-MNIST, LV-ViT of 12 blocks")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
