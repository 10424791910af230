"""docs/speed.md and its picture."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.speed_parts.row import How, SpeedRow

__all__ = ["BARS", "as_page", "draw"]

# Batch size -> least share of the FLOP bound, for plain hosts in eager mode.
BARS = {32: 1.00, 8: 0.95, 1: 0.85}
OUTSIDE_BAR = 0.04
TITLES: dict[How, str] = {
    "eager": "Eager",
    "kept": "Eager, memory kept",
    "compile": "`torch.compile(dynamic=True)` on both sides",
}
HEAD = """# Speed

Eval forwards of the dense host (with fused attention) and of the same host wrapped at base keep
ratio 0.7, interleaved in one process: {machine}. Made by

    OMP_NUM_THREADS={threads} python -m benchmarks.speed

*Speed-up* is the median over all rounds of the ratio of a round, in brackets the smallest and the
largest; *runs* is the number of rounds and of processes. *Bound* is dense MACs / pruned MACs: the
speed-up if time were proportional to MACs. *Own share* is the time inside this library's
functions (predictors, selection, gathering), out of the pruned forward. *Kernel* is the share of
CPU time of the operating system, for either side. Bars, for plain (isotropic) hosts in eager mode:
at least 1.00 x the bound at batch 32, 0.95 x at 8, 0.85 x at 1, and an own share of at most 4 % at
batch 32.

![speed-up against the bound](speed.png)
"""
REMARKS = """## Where a bar is missed, and why

- **Memory.** glibc returns a freed block of more than 32 MiB to the system, which clears new pages
  when the next block is allocated; on this machine that is a large part of the time at batch 32
  (columns *kernel*). Pruning makes most tensors smaller than that limit, so it saves more than
  arithmetic, or less where it does not. *Memory kept* switches this off (`GLIBC_TUNABLES`, see
  `benchmarks/speed_parts/row.py`; jemalloc and tcmalloc do so too), so only arithmetic is left.
  It is the fairer comparison; the first table shows the default.
- **Noise.** The machine is shared; the brackets show how much rounds differ. Processes differ too:
  DeiT-B at batch 8 has no kernel time in either table, so both measure the same, with 1.60x and
  1.46x; a single process (`--processes 1`) once gave 1.31x. Hence the several processes. A few
  hundredths above or below a bar are within this noise.
- **LV-ViT-S.** Three tenths of its MACs after pruning lie outside the blocks, most of them in the
  convolutions of its stem (`tokenprune inspect timm:lvvit_s -r dynamicvit-lvvit-s-k0.7`). Pruning
  saves in the blocks only.
- **Batch 1.** A stage adds many small operators (*own share*); MACs do not count their launch.
- **Swin-T** is pruned by `bypass`: dropped tokens only skip the MLPs of one of its four grids.
  There is little to gain, and at batch 1 nothing.
- **Batch 64 and `torch.compile`** ran in one process each, batch 64 of DeiT-S, EVA-02-S and Swin-T
  before predictors processed the channels that tokens share once per image (bounds 0.6 % lower).
  LV-ViT-S compiles once for less than 16 images and once for more: torch chooses another kernel for
  its convolutions there, in the dense host too.
"""
PARTS = """## Rows that nobody reads

<!-- unread -->
<!-- end -->

## From 196 to 4,096 tokens

<!-- growth -->
<!-- end -->

<!-- large -->
<!-- end -->
"""


def as_page(rows: Sequence[SpeedRow], machine: str, threads: int) -> str:
    """The document.

    Args:
        rows: measured.
        machine: in words.
        threads: of torch.
    """
    parts = [HEAD.format(machine=machine, threads=threads), _bars(rows)]
    for how, title in TITLES.items():
        own = [row for row in rows if row.how == how]
        if own:
            parts.append(f"## {title}\n\n{_table(own)}\n")
            others = {row.host for row in rows} - {row.host for row in own}
            if others:
                parts.append(f"Not measured: {', '.join(sorted(others))}.\n")
    return "\n".join([*parts, PARTS, REMARKS])


def _bars(rows: Sequence[SpeedRow]) -> str:
    lines = ["| bar | met by | missed by |", "|---|---|---|"]
    for how, title in TITLES.items():
        plain = [row for row in rows if row.plain and row.how == how]
        if how == "compile" or not plain:
            continue
        for batch, bar in BARS.items():
            own = [(r.host, r.speedup / r.bound) for r in plain if r.batch == batch]
            name = f"{title.lower()}, batch {batch}: >= {bar:.2f} x bound"
            lines.append(_bar(name, own, lambda v, b=bar: v >= b))
        shares = [(r.host, r.outside) for r in plain if r.batch == 32 and r.outside is not None]
        name = f"{title.lower()}, batch 32: own share <= 4 %"
        lines.append(_bar(name, shares, lambda v: v <= OUTSIDE_BAR, "{:.1%}"))
    return "\n".join(lines) + "\n"


def _bar(
    name: str,
    values: Sequence[tuple[str, float]],
    holds: Callable[[float], bool],
    form: str = "{:.2f}",
) -> str:
    def cell(wanted: bool) -> str:
        found = [f"{host} {form.format(v)}" for host, v in values if holds(v) == wanted]
        return ", ".join(found) or "-"

    return f"| {name} | {cell(True)} | {cell(False)} |"


def _table(rows: Sequence[SpeedRow]) -> str:
    lines = [
        "| host | batch | dense, ms | pruned, ms | speed-up | bound | of the bound | own share | "
        "kernel, dense | pruned | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (not r.plain, r.host, r.batch)):
        shares = (r.outside, r.dense_kernel, r.pruned_kernel)
        said = " | ".join("-" if share is None else f"{share:.1%}" for share in shares)
        lines.append(
            f"| {r.host} | {r.batch} | {r.dense * 1e3:.1f} | {r.pruned * 1e3:.1f} | "
            f"{r.speedup:.2f}x ({r.low:.2f} to {r.high:.2f}) | {r.bound:.2f}x | "
            f"{r.speedup / r.bound:.2f} | {said} | "
            f"{r.rounds} in {r.processes} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[SpeedRow], file: Path) -> None:
    """Speed-up relative to the bound, by batch size: a panel per mode, a line per host."""
    hows = [how for how in TITLES if any(row.how == how for row in rows)]
    hosts = list(dict.fromkeys(row.host for row in rows))
    batches = sorted({row.batch for row in rows})
    figure, panels = pyplot.subplots(
        1, len(hows), figsize=(5 * len(hows), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for how, axes in zip(hows, panels[0], strict=True):
        for number, host in enumerate(hosts):
            own = sorted(
                (r.batch, r.speedup / r.bound) for r in rows if (r.how, r.host) == (how, host)
            )
            if own:
                axes.plot(*zip(*own, strict=True), marker="o", color=f"C{number}", label=host)
        if how != "compile":
            axes.plot(sorted(BARS), [BARS[b] for b in sorted(BARS)], "k:", label="bar")
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("batch size")
        axes.set_title(TITLES[how].replace("`", ""))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("speed-up / FLOP bound")
    panels[0][0].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
