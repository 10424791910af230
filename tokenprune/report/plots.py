"""Pictures of what methods cost, lose and gain."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenprune.errors import MissingDependencyError

__all__ = ["draw_blocks", "draw_costs", "draw_speed"]


def draw_costs(
    path: Path, points: Sequence[tuple[str, float, float]], what: str, lines: bool = False
) -> Path:
    """Write a picture of points.

    Args:
        path: Its ending says which format.
        points: (name, share of the dense MACs, loss).
        what: What the loss is.
        lines: Points of one name are joined.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    axes = _axes("costs")
    for name in dict.fromkeys(name for name, *_ in points):
        own = sorted((macs, loss) for n, macs, loss in points if n == name)
        style = "o-" if lines else "o"
        axes.plot([macs for macs, _ in own], [loss for _, loss in own], style, label=name)
    shares = [macs for _, macs, _ in points]
    axes.set_xlim(min(shares) - 0.05, max(shares) + 0.05)
    return _saved(axes, path, "share of the dense MACs", what)


def draw_speed(
    path: Path, sides: Mapping[str, Sequence[tuple[int, float]]], predicted: float
) -> Path:
    """Write a picture of speed-ups.

    Args:
        path: Its ending says which format.
        sides: Name -> (batch size, dense time / its time).
        predicted: Speed-up by MACs.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    axes = _axes("speed")
    for name, points in sides.items():
        axes.plot([b for b, _ in points], [gain for _, gain in points], "o-", label=name)
    sizes = sorted({batch for points in sides.values() for batch, _ in points})
    axes.axhline(predicted, linestyle="--", color="gray", label="by MACs")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    return _saved(axes, path, "batch size", "dense time / time")


def draw_blocks(path: Path, dense: Sequence[float], pruned: Sequence[float]) -> Path:
    """Write a picture of what each block costs.

    Args:
        path: Its ending says which format.
        dense: 10^9 MACs of each block of the dense host.
        pruned: The same as the model runs it, with the predictor before the block.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    axes = _axes("blocks")
    numbers = range(len(dense))
    axes.bar(numbers, dense, color="#c9d6e6", label="dense")
    axes.bar(numbers, pruned, width=0.55, color="#2f6fb7", label="this model")
    axes.set_xticks(list(numbers))
    axes.set_axisbelow(True)
    return _saved(axes, path, "block", "GMACs of one image")


def _axes(what: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            f"A picture of {what} needs matplotlib. Run: pip install matplotlib. The table has the "
            "same figures: print(report)."
        ) from None
    return Figure(figsize=(7, 4.5), layout="constrained").add_subplot()


def _saved(axes: Any, path: Path, x: str, y: str) -> Path:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path)
    return path
