"""Hosts that keep a grid: what bypass saves of their MACs, and what removing saves in stretches.

    python -m benchmarks.stretches                 a host of each family, about ten minutes
    python -m benchmarks.stretches --only 'hiera*' these models instead
    python -m benchmarks.stretches --render-only   write the table of docs/dense.md again

The families are those of docs/atlas.json whose mode is `bypass`, by their module and the first word
of their names; of each, the host with the median number of MACs. What bypass saves, the atlas has
measured. Here the MACs of one image are counted with `mode: remove` at keep ratio 0.7. Hosts above
30 M parameters have no weights. Rows are saved one by one in a work folder.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import tokenprune
from benchmarks.atlas_parts.measure import SMALL_PARAMETERS, Host
from benchmarks.atlas_parts.timm_hosts import timm_hosts
from benchmarks.atlas_parts.transformers_hosts import transformers_hosts
from benchmarks.atlas_parts.weights import enliven, parameters_in_millions, weightless
from benchmarks.markdown import put, table
from tokenprune.errors import TokenPruneError

__all__ = ["chosen", "main", "measure", "rendered"]

ROOT = Path(__file__).parents[1]
RECIPE = {"version": 1, "mode": "remove", "schedule": {"keep_ratio": 0.7}}
Row = dict[str, Any]


def chosen(atlas: Iterable[Row], only: str | None = None) -> list[Row]:
    """The rows of the atlas of the models to measure."""
    families: dict[str, list[Row]] = defaultdict(list)
    for row in atlas:
        if row["mode"] == "bypass" and row["status"] == "certified":
            word = re.match(r"twins_[a-z]+|[A-Za-z]+?(?=For|v?\d|_|$)", row["model"])
            if word and word[0] != "test":
                families[f"{row['module'].rpartition('.')[2]} {word[0]}"].append(row)
    if only is not None:
        return [r for rows in families.values() for r in rows if fnmatch(r["model"], only)]
    ranked = (sorted(rows, key=lambda r: r["gmacs_dense"]) for _, rows in sorted(families.items()))
    return [rows[len(rows) // 2] | {"models": len(rows)} for rows in ranked]


def measure(host: Host, known: Row) -> Row:
    """What each mode saves, in percent of the dense MACs; None and why if it serves no part."""
    row: Row = {"model": host.model, "module": host.module.rpartition(".")[2]}
    row["dense"] = known["gmacs_dense"]
    row["bypass"] = round(100 * (1 - known["gmacs_pruned"] / known["gmacs_dense"]), 2)
    full = weightless(host.build)
    if parameters_in_millions(full) < SMALL_PARAMETERS:  # weights tell which are class tokens
        full = enliven(host.build().eval())
    given = {"example_inputs": host.inputs(full), "restore": host.restore}
    try:
        model = tokenprune.wrap(full, RECIPE, **given, verify=False, train=False)
    except TokenPruneError as error:
        return row | {"remove": None, "why": str(error)}
    counted = tokenprune.profile(model, given["example_inputs"])
    row["remove"] = round(100 * (1 - counted.gmacs / counted.dense_gmacs), 2)
    row |= {"at": list(counted.stages), "of": len(counted.macs_per_block)}
    return row | {"tokens": list(counted.patches_per_stage)}


def rendered(rows: Sequence[Row], models: Mapping[str, int]) -> str:
    """The table, and the medians.

    Args:
        models: Model -> how many its family has.
    """
    lines, bypass, best = [], list[float](), list[float]()
    for row in sorted(rows, key=lambda row: (row["module"], row["model"])):
        both = [row["bypass"], row["remove"]]
        of = models.get(row["model"], 1)
        bypass += [row["bypass"]] * of
        best += [max(saved for saved in both if saved is not None)] * of
        cells = ["none" if saved is None else f"{saved:.1f} %" for saved in both]
        if row["remove"] is not None and row["remove"] > (row["bypass"] or 0):
            cells[1] = f"**{cells[1]}**"
        where = ", ".join(map(str, row.get("at", ()))) or "-"
        names = [f"`{row['module']}`", str(of), f"`{row['model']}`", f"{row['dense']:.3g}"]
        lines.append([*names, *cells, where])
    head = ["family", "models", "of which", "GMACs", "bypass saves", "remove saves", "at blocks"]
    words = f"{median(bypass):.1f} % by bypass, {median(best):.1f} % by the better of both"
    few = sum(saved < 5 for saved in best)
    return (
        f"{table(head, lines)}\n\nIf every model of a family saves what this one does, the median "
        f"of the {len(best)} models is {words}; {few} save less than 5 %."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "stretches")
    parser.add_argument("--only", help="names of models, as a pattern")
    parser.add_argument("--render-only", action="store_true")
    asked = parser.parse_args(arguments)
    asked.work.mkdir(parents=True, exist_ok=True)
    path = asked.work / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    atlas = json.loads((ROOT / "docs" / "atlas.json").read_text())
    if not asked.render_only:
        hosts = {host.model: host for host in [*timm_hosts(), *transformers_hosts()]}
        there = {row["model"] for row in rows}
        for known in chosen(atlas, asked.only):
            if known["model"] not in there:
                rows.append(measure(hosts[known["model"]], known))
                print(rows[-1], flush=True)
                with path.open("a") as file:
                    print(json.dumps(rows[-1]), file=file)
    models = {row["model"]: row["models"] for row in chosen(atlas)}
    put(ROOT / "docs" / "dense.md", "stretches", rendered(rows, models))


if __name__ == "__main__":
    main()
