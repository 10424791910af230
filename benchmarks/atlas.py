"""The atlas: wrap every attention model of timm and transformers, and record the results.

    python -m benchmarks.atlas                           all rows, about an hour and a half
    python -m benchmarks.atlas --library timm --only 'vit_*' --jobs 2
    python -m benchmarks.atlas --again-refused           measure refused rows again
    python -m benchmarks.atlas --render-only             write docs/atlas.* with the rows so far

Rows are saved in a work folder one by one; an interrupted run resumes. The documents are written
once no row of the scope is missing, or with --render-only.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.atlas_parts.measure import Host, measure
from benchmarks.atlas_parts.page import as_json, as_page, read_json
from benchmarks.atlas_parts.pool import Limits, run
from benchmarks.atlas_parts.row import Row
from benchmarks.atlas_parts.timm_hosts import TimmHost, timm_hosts
from benchmarks.atlas_parts.transformers_hosts import transformers_hosts
from benchmarks.held_out_parts.measure import ABSENT

__all__ = ["Store", "estimate", "main", "published", "scope"]

ROOT = Path(__file__).parents[1]
MANY = 10  # rows for which a warm-up pays
SECONDS_A_ROW = 8.0  # before any row was measured
MEASURED = ("torch", "timm", "transformers")

Key = tuple[str, str]


class Store:
    """The rows of a work folder, one JSON line each; of two with the same key the later one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[Key, Row] = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # a run that was killed may leave half a line
                    row = Row.from_json(line)
                    self.rows[row.key] = row
            whole = "".join(row.to_json() + "\n" for row in self.rows.values())
            self.path.write_text(whole)

    def add(self, row: Row) -> None:
        """Save a row, on disk first."""
        with self.path.open("a") as file:
            file.write(row.to_json() + "\n")
        self.rows[row.key] = row


def published(file: Path) -> dict[Key, Row]:
    """The rows of a json file of the docs; none if it is not there."""
    return {row.key: row for row in read_json(file.read_text())} if file.exists() else {}


def scope() -> list[Host]:
    """Every model of the atlas."""
    return [*timm_hosts(), *transformers_hosts()]


def estimate(count: int, rows: Mapping[Key, Row], jobs: int) -> str:
    """How long `count` rows will take, from those that were measured."""
    known = [row.seconds for row in rows.values() if row.seconds is not None]
    seconds = mean(known) if known else SECONDS_A_ROW
    minutes = count * seconds / jobs / 60
    return (
        f"{count} rows to measure, {len(rows)} there; about {minutes:.0f} min "
        f"({seconds:.1f} s a row, {jobs} at a time)"
    )


def write(hosts: Sequence[Host], rows: Mapping[Key, Row], folder: Path) -> None:
    """Write both documents."""
    ordered = [rows[h.library, h.model] for h in hosts if (h.library, h.model) in rows]
    expected = Counter(host.library for host in hosts)
    versions = {name: version(name).partition("+")[0] for name in MEASURED}
    (folder / "atlas.json").write_text(as_json(ordered))
    held_out = published(folder / "held_out.json")  # of python -m benchmarks.held_out
    ran = [row for row in held_out.values() if row.status != ABSENT]
    (folder / "atlas.md").write_text(as_page(ordered, expected, versions, ran))


def main(arguments: Sequence[str] | None = None, hosts: Sequence[Host] | None = None) -> None:
    """The command line; `hosts` replaces the scope."""
    options = _options(arguments)
    echo = Console().print
    hosts = scope() if hosts is None else hosts
    store = Store(options.work)
    if not options.render_only:
        chosen = [
            host
            for host in hosts
            if options.library in (None, host.library) and fnmatch(host.model, options.only)
        ]
        todo = [host for host in chosen if _open(host, store, options.again_refused)]
        echo(estimate(len(todo), store.rows, options.jobs))
        limits = Limits(options.seconds, options.gigabytes)
        _measure(todo, store, options.jobs, limits)
    rows = store.rows
    if options.render_only:
        rows = published(options.docs / "atlas.json") | rows
    missing = [host.model for host in hosts if (host.library, host.model) not in rows]
    if missing and not options.render_only:
        echo(f"{len(missing)} of {len(hosts)} rows are missing: docs stay as they are.")
        return
    write(hosts, rows, options.docs)
    good = sum(rows[h.library, h.model].certified for h in hosts if h.model not in missing)
    echo(f"{good} of {len(hosts)} certified; wrote {options.docs}/atlas.md and atlas.json")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.atlas", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--library", choices=("timm", "transformers"), help="only this one")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only matching models")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time")
    parser.add_argument("--again-refused", action="store_true", help="measure refused rows again")
    parser.add_argument("--render-only", action="store_true", help="measure nothing, write docs")
    parser.add_argument(
        "--seconds", type=float, default=Limits.seconds, help="CPU limit of a model"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=Limits.gigabytes, help="memory limit of a model"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "atlas", help="rows so far")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    return parser.parse_args(arguments)


def _open(host: Host, store: Store, again_refused: bool) -> bool:
    row = store.rows.get((host.library, host.model))
    return row is None or (again_refused and not row.certified)


def _measure(hosts: Sequence[Host], store: Store, jobs: int, limits: Limits) -> None:
    torch.set_num_threads(1)  # before any fork: a child must not inherit a thread pool
    if len(hosts) >= MANY:  # children inherit what torch imports and caches at first use
        measure(TimmHost("test_vit", "vision_transformer"))
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[good]} certified, {task.fields[bad]} refused"),
        TextColumn("{task.description}"),
    )
    # No refreshing thread: a fork while it holds a lock would deadlock.
    with Progress(*columns, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(hosts), good=0, bad=0)

        def starting(host: Host) -> None:
            progress.update(task, description=host.model, refresh=True)

        count = Counter[bool]()
        for row in run(hosts, jobs, limits, starting):
            store.add(row)
            count[row.certified] += 1
            progress.update(task, advance=1, good=count[True], bad=count[False], refresh=True)
            if not row.certified:
                progress.console.print(f"{row.library} {row.model}: {row.reason[:160]}")


if __name__ == "__main__":
    main()
