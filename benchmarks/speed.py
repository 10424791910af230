"""Speed of wrapped hosts against dense ones: writes docs/speed.md, .json and .png.

    OMP_NUM_THREADS=2 python -m benchmarks.speed              all of it, about an hour and a half
    OMP_NUM_THREADS=2 python -m benchmarks.speed --only DeiT-S --how eager
    python -m benchmarks.speed --render-only                  write the documents only

`--how kept` is eager with an allocator that returns no memory to the system (glibc's). Rows are
saved in docs/speed.json one by one; a new measurement replaces the old row. Nothing else should run
on the machine.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.markdown import carry
from benchmarks.speed_parts.hosts import HOSTS
from benchmarks.speed_parts.page import as_page, draw
from benchmarks.speed_parts.row import How, SpeedRow, rows_of

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
HOWS: tuple[How, ...] = ("eager", "compile", "kept")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _options(arguments)
    echo = Console().print
    kept = options.docs / "speed.json"
    known = json.loads(kept.read_text()) if kept.exists() else {"rows": []}
    rows = {_key(row): row for row in (SpeedRow(**entry) for entry in known["rows"])}
    threads = torch.get_num_threads()
    for how in () if options.render_only else options.how:
        for host in (host for host in HOSTS if fnmatch(host.name, options.only)):
            batches = tuple(b for b in host.batches if b in options.batch)
            for row in rows_of(host, how, batches, options.budget, options.processes):
                rows[_key(row)] = row
                echo(
                    f"{row.host}, {how}, batch {row.batch}: {row.speedup:.3f}x, "
                    f"{row.speedup / row.bound:.3f} of the bound"
                )
            known = {"threads": threads, "machine": _machine(threads)}
            known["rows"] = [asdict(row) for row in rows.values()]
            kept.write_text(json.dumps(known, indent=1) + "\n")
    found = list(rows.values())
    draw(found, options.docs / "speed.png")
    file = options.docs / "speed.md"
    page = as_page(found, known["machine"], known["threads"])
    file.write_text(carry(file.read_text() if file.exists() else "", page))
    echo(f"wrote {options.docs}/speed.md, .json and .png")


def _key(row: SpeedRow) -> tuple[str, str, int]:
    return row.host, row.how, row.batch


def _machine(threads: int) -> str:
    version = torch.__version__.partition("+")[0]
    return f"{platform.machine()}, {threads} threads, float32, torch {version}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="only matching hosts")
    parser.add_argument("--how", nargs="+", choices=HOWS, default=list(HOWS), help="modes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64], help="sizes")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a batch size")
    parser.add_argument("--processes", type=int, default=3, help="one after the other")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
