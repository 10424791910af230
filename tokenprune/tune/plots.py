"""Pictures of what methods cost and lose."""

from collections.abc import Sequence
from pathlib import Path

from tokenprune.errors import MissingDependencyError

__all__ = ["draw_costs"]


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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "A picture of costs needs matplotlib: pip install matplotlib. The table has the same "
            "figures: print(report)."
        ) from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(name for name, *_ in points):
        own = sorted((macs, loss) for n, macs, loss in points if n == name)
        style = "o-" if lines else "o"
        axes.plot([macs for macs, _ in own], [loss for _, loss in own], style, label=name)
    shares = [macs for _, macs, _ in points]
    axes.set_xlim(min(shares) - 0.05, max(shares) + 0.05)
    axes.set_xlabel("share of the dense MACs")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
