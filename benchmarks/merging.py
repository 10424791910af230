"""Merging on a CPU against the dense host and the public ToMe. Writes docs/merging.md.

    python -m benchmarks.merging --peer PATH     PATH: a clone of github.com/facebookresearch/ToMe
    python -m benchmarks.merging --render-only   write the page only

All models of a batch size take turns in one process. A measurement replaces the old figures in
docs/merging.json.
"""

import argparse
import copy
import json
import platform
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokenprune
from benchmarks.markdown import table
from tokenprune.cost.replay import replay_of
from tokenprune.cost.timing import interleaved
from tokenprune.runtime.model import pruning_of

__all__ = ["main"]

DOCS = Path(__file__).parents[1] / "docs"
TRAINED, STEP_BATCH, STEP_MACS = ("merge-k0.7", "tome-r13", "evit-k0.7"), 16, 0.65
HOST, RECIPES, R = "deit_small_patch16_224", ("tome-r13", "merge-k0.7"), 13
HEAD = """# Speed of merging

{host} with random weights, float32, {threads} CPU thread(s) of {machine}. All columns of a row took
turns in one process; milliseconds are medians of {rounds} rounds, and one round differed from its
median by up to the spread. {note}

*Replay* is the host on as many tokens as `tome-r13` leaves, cut off in front of the blocks instead
of merged: the best that is possible without any matching. *ToMe* is the authors' code (their timm
patch, at r = 13) on the same weights; its logits and ours differ by at most {error:.0e}. *Against
ToMe* is its time over ours.
"""
STEPS = """## A training step

Forward, loss, backward and AdamW at batch {batch}, each method at {macs:g} of the dense MACs
(`set_budget`). They train on the path that eval runs, so a step costs less than a dense one. A
round differed from its median by up to {spread:.0f} %.

{rows}
"""


def public_tome(clone: Path, host: nn.Module) -> nn.Module:
    """The host, patched by the authors' code."""
    sys.path.insert(0, str(clone))
    patched: Any = copy.deepcopy(host)
    import_module("tome.patch.timm").apply_patch(patched)
    patched.r = R
    return patched  # type: ignore[no-any-return]


def measured(peer: Path | None, batches: list[int], rounds: int) -> dict[str, Any]:
    """All figures of one run."""
    torch.manual_seed(0)
    dense = timm.create_model(HOST).eval()
    models: dict[str, nn.Module] = {"dense": dense}
    for recipe in RECIPES:
        models[recipe] = tokenprune.wrap(copy.deepcopy(dense), recipe, verify=False, train=False)
    if peer is not None:
        models["ToMe"] = public_tome(peer, dense)
    found: dict[str, Any] = {"rows": [], "error": None}
    with torch.inference_mode():
        for batch in batches:
            images = torch.randn(batch, 3, 224, 224)
            cut = replay_of(models["tome-r13"], pruning_of(models["tome-r13"]).inputs((images,)))
            if cut is None:
                raise RuntimeError(f"{HOST} cannot be replayed")
            if peer is not None:
                found["error"] = max(found["error"] or 0.0, _apart(models, images))
            calls = {name: partial(model, images) for name, model in models.items()}
            timings = interleaved(calls | {"replay": partial(cut, images)}, rounds=rounds)
            row = {name: timing.seconds * 1e3 for name, timing in timings.items()}
            spread = max(timing.spread for timing in timings.values())
            found["rows"].append({"batch": batch, "milliseconds": row, "spread": spread})
            print(found["rows"][-1], file=sys.stderr, flush=True)
    found["steps"] = trained(dense, max(rounds // 3, 3))
    return found


def trained(dense: nn.Module, rounds: int) -> dict[str, Any]:
    """What a training step costs at a share of the MACs: forward, loss, backward, AdamW."""
    images, labels = torch.randn(STEP_BATCH, 3, 224, 224), torch.arange(STEP_BATCH)
    models: dict[str, Any] = {"dense": copy.deepcopy(dense)}
    for name in TRAINED:
        models[name] = tokenprune.wrap(copy.deepcopy(dense), name, verify=False)
        models[name].set_budget(STEP_MACS)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {
        name: partial(step, model.train(), torch.optim.AdamW(model.parameters(), 1e-5))
        for name, model in models.items()
    }
    timings = interleaved(calls, rounds=rounds)
    spread = max(timing.spread for timing in timings.values())
    return {name: timing.seconds for name, timing in timings.items()} | {"spread": spread}


def _apart(models: dict[str, nn.Module], images: Tensor) -> float:
    """Largest difference between the logits of the public ToMe and ours."""
    return float((models["ToMe"](images) - models["tome-r13"](images)).abs().max())


def as_page(found: dict[str, Any]) -> str:
    """docs/merging.md."""
    rows = []
    for row in found["rows"]:
        took = row["milliseconds"]
        cells = [str(row["batch"]), *(f"{took[n]:.1f}" for n in ("dense", "replay", *RECIPES))]
        cells += [f"{took['dense'] / took[recipe]:.2f}x" for recipe in RECIPES]
        public = took.get("ToMe")
        cells += (
            ["", ""] if public is None else [f"{public:.1f}", f"{public / took[RECIPES[0]]:.2f}x"]
        )
        rows.append([*cells, f"{100 * row['spread']:.0f} %"])
    head = ["batch", "dense, ms", "replay, ms", *(f"{recipe}, ms" for recipe in RECIPES)]
    head += [*(f"speed-up, {recipe}" for recipe in RECIPES), "ToMe, ms", "against ToMe", "spread"]
    about = {name: found[name] for name in ("threads", "machine", "rounds", "note")}
    text = HEAD.format(host=HOST, error=found["error"] or 0.0, **about)
    took = found["steps"]
    steps = [[n, f"{took[n]:.2f}", f"{took[n] / took['dense']:.2f}x"] for n in ("dense", *TRAINED)]
    below = STEPS.format(
        batch=STEP_BATCH,
        macs=STEP_MACS,
        rows=table(["method", "seconds", "of dense"], steps),
        spread=100 * took["spread"],
    )
    return f"{text}\n{table(head, rows)}\n\n{below}\nMeasured with `{found['command']}`.\n"


def main() -> None:
    """Measure, and write both documents."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", type=Path, help="a clone of facebookresearch/ToMe")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="", help="about the machine, for the page")
    parser.add_argument("--render-only", action="store_true")
    given = parser.parse_args()
    figures = DOCS / "merging.json"
    if given.render_only:
        found = json.loads(figures.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(given.threads)
        found = measured(given.peer, given.batch, given.rounds)
        found |= {"threads": given.threads, "rounds": given.rounds, "note": given.note}
        found |= {"machine": platform.machine()}
        asked = [text for text in sys.argv[1:] if not text.startswith("/")]
        found["command"] = " ".join(["python -m benchmarks.merging", *asked]).replace(
            "--peer", "--peer PATH"
        )
        figures.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (DOCS / "merging.md").write_text(as_page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
