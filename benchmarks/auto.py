"""What `wrap(host, "auto")` chooses, and what that saves. Writes docs/auto.md.

    python -m benchmarks.auto                    count a host of each family that keeps a grid
    python -m benchmarks.auto --only 'swin*'     these models instead
    python -m benchmarks.auto --speed MODEL      time it against dense at batch 8
    python -m benchmarks.auto --wrap MODEL       time the wrap itself against one without a choice
    python -m benchmarks.auto --render-only      write the page only

The families are those of timm in docs/atlas.json whose mode is `bypass`, by their module and the
first word of their names; of each, the host with the fewest MACs. It is counted without weights.
Figures are kept in docs/auto.json; a measurement replaces the old one.
"""

import argparse
import json
import platform
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch

import tokenprune
from benchmarks.atlas_parts.measure import Host
from benchmarks.atlas_parts.timm_hosts import timm_hosts
from benchmarks.atlas_parts.weights import weightless
from benchmarks.markdown import put, table
from tokenprune.cost.auto import LEAST
from tokenprune.cost.timing import interleaved
from tokenprune.errors import TokenPruneError, TokenPruneWarning
from tokenprune.runtime.model import pruning_of

__all__ = ["families", "main"]

DOCS = Path(__file__).parents[1] / "docs"
BATCH, SPEED_ROUNDS, WRAP_ROUNDS = 8, 9, 3
Row = dict[str, Any]


def families(atlas: Iterable[Row], only: str | None = None) -> list[Row]:
    """The rows of the atlas of the hosts to count; `models` says how many a family has."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in atlas:
        if (row["library"], row["mode"], row["status"]) == ("timm", "bypass", "certified"):
            word = re.match(r"twins_[a-z]+|[A-Za-z]+?(?=For|v?\d|_|$)", row["model"])
            if word and word[0] != "test":
                found[row["module"].rpartition(".")[2], word[0]].append(row)
    if only is not None:
        return [row for rows in found.values() for row in rows if fnmatch(row["model"], only)]
    least = (min(rows, key=lambda row: row["gmacs_dense"]) for _, rows in sorted(found.items()))
    sizes = (len(rows) for _, rows in sorted(found.items()))
    return [{**row, "models": models} for row, models in zip(least, sizes, strict=True)]


def count(host: Host) -> Row:
    """What auto chooses for a host; or why it serves none."""
    row: Row = {"module": host.module.rpartition(".")[2]}
    full = weightless(host.build)
    inputs = host.inputs(full)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "saves little", TokenPruneWarning)
            options: Row = {"example_inputs": inputs, "restore": host.restore}
            model = tokenprune.wrap(full, "auto", **options, verify=False, train=False)
    except TokenPruneError as error:
        return {**row, "refused": str(error)}
    counted, recipe = tokenprune.profile(model, inputs), pruning_of(model).recipe
    others = re.findall(r"(-?[\d.]+) % by ([\w-]+(?:\.\d+)?)", recipe.description)
    return {
        **row,
        "dense": round(counted.dense_gmacs, 3),
        "chosen": recipe.name,
        "stages": list(counted.stages),
        "blocks": len(counted.blocks),
        "saved": round(100 * (1 - counted.ratio), 1),
        "others": {name: float(saved) for saved, name in others},
    }


def speed(name: str) -> Row:
    """Milliseconds of a batch, dense and by auto, in turns."""
    torch.manual_seed(0)
    host = timm.create_model(name).eval()
    model = tokenprune.wrap(host, "auto", train=False).eval()
    pruning_of(model).fitted = True  # time does not depend on what predictors have learned
    images = torch.randn(BATCH, *timm.data.resolve_model_data_config(host)["input_size"])
    with torch.inference_mode():
        calls = {"dense": partial(host, images), "auto": partial(model, images)}
        times = interleaved(calls, rounds=SPEED_ROUNDS)
    return {
        "chosen": pruning_of(model).recipe.name,
        "macs": round(tokenprune.profile(model).ratio, 3),
        **{side: round(1e3 * timing.seconds, 1) for side, timing in times.items()},
        "spread": round(100 * max(timing.spread for timing in times.values())),
        **_machine(),
    }


def wrapping(name: str) -> Row:
    """CPU seconds of `wrap` by auto and by the recipe that it chooses, in turns."""
    host = timm.create_model(name).eval()
    chosen = pruning_of(tokenprune.wrap(host, "auto")).recipe.name
    taken: dict[str, list[float]] = {chosen: [], "auto": []}
    for _ in range(WRAP_ROUNDS):
        for how, times in taken.items():
            started = time.process_time()
            tokenprune.wrap(host, how)
            times.append(time.process_time() - started)
    seconds = {how: round(median(each), 2) for how, each in taken.items()}
    return {"chosen": chosen, "alone": seconds[chosen], "auto": seconds["auto"], **_machine()}


def _machine() -> Row:
    about = f"{platform.machine()}, torch {torch.__version__}"
    return {"machine": about, "threads": torch.get_num_threads()}


def counts_table(rows: dict[str, Row]) -> str:
    """The table of counted hosts, and what it comes to."""
    lines, saved, of_models = [], list[float](), list[float]()
    for model, row in sorted(rows.items(), key=lambda item: (item[1]["module"], item[0])):
        begins = [f"`{row['module']}`", f"`{model}`"]
        if "refused" in row:
            lines.append([*begins, "", "refused", "", ""])
            continue
        saved.append(row["saved"])
        of_models += [row["saved"]] * row.get("models", 0)
        others = ", ".join(f"{name} {share:g} %" for name, share in row["others"].items())
        little = row["saved"] < 100 * LEAST
        share = f"{row['saved']:g} %{' (warns)' if little else ''}"
        lines.append([*begins, f"{row['dense']:.3g}", row["chosen"], share, others or "none"])
    head = ["family", "host", "GMACs", "auto takes", "saves", "others"]
    low = sum(share < 100 * LEAST for share in saved)
    return (
        f"{table(head, lines)}\n\nMedian over these {len(saved)}: **{median(saved):.1f} %**; "
        f"if every model of a family saves what this one does, {median(of_models):.1f} % over "
        f"their {len(of_models)} models. {low or 'None'} of them save less than {100 * LEAST:g} %, "
        "where `wrap` warns."
    )


def speed_table(rows: dict[str, Row]) -> str:
    """Time against dense."""
    head = ["host", "auto takes", "MACs", "dense, ms", "auto, ms", "speed-up", "spread", "on"]
    lines = [
        [
            f"`{model}`",
            row["chosen"],
            f"{row['macs']:.3f}",
            *(f"{row[side]:.1f}" for side in ("dense", "auto")),
            f"**{row['dense'] / row['auto']:.2f}x**",
            f"{row['spread']} %",
            f"{row['machine']}, {row['threads']} thread(s)",
        ]
        for model, row in rows.items()
    ]
    return table(head, lines)


def wrap_table(rows: dict[str, Row]) -> str:
    """Time of wrapping."""
    head = ["host", "auto takes", "by that name, s", "by auto, s", "times", "on"]
    lines = [
        [
            f"`{model}`",
            row["chosen"],
            f"{row['alone']:.1f}",
            f"{row['auto']:.1f}",
            f"{row['auto'] / row['alone']:.2f}x",
            f"{row['machine']}, {row['threads']} thread(s)",
        ]
        for model, row in rows.items()
    ]
    return table(head, lines)


TABLES = {"counts": counts_table, "speed": speed_table, "wrap": wrap_table}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="GLOB", help="count matching models")
    parser.add_argument("--speed", metavar="MODEL", action="append", default=[])
    parser.add_argument("--wrap", metavar="MODEL", action="append", default=[])
    parser.add_argument("--again", action="store_true", help="count hosts again that are there")
    parser.add_argument("--render-only", action="store_true")
    asked = parser.parse_args(arguments)
    path = DOCS / "auto.json"
    found: dict[str, dict[str, Row]] = json.loads(path.read_text()) if path.exists() else {}
    found = {name: found.get(name, {}) for name in TABLES}

    def noted(name: str, model: str, row: Row) -> None:
        found[name][model] = row
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(model, row, flush=True)

    for model in asked.speed:
        noted("speed", model, speed(model))
    for model in asked.wrap:
        noted("wrap", model, wrapping(model))
    if not (asked.speed or asked.wrap or asked.render_only):
        hosts = {host.model: host for host in timm_hosts()}
        for known in families(json.loads((DOCS / "atlas.json").read_text()), asked.only):
            model, models = known["model"], {"models": known["models"]} if "models" in known else {}
            if asked.again or model not in found["counts"]:
                noted("counts", model, count(hosts[model]) | models)
            elif models:
                found["counts"][model] |= models
                path.write_text(json.dumps(found, indent=1) + "\n")
    for name, make in TABLES.items():
        if found[name]:
            put(DOCS / "auto.md", name, make(found[name]))


if __name__ == "__main__":
    main()
