"""`tokenprune demo`: train a small ViT on digits, prune it, measure accuracy and speed."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tokenprune.checkpoints.directory import save
from tokenprune.checks.verify import verify
from tokenprune.cli.console import bar, report, say, working
from tokenprune.cli.demo_report import Figures, accuracy_table, settings_table, speed_table, write
from tokenprune.cli.inspect import certificate_table, cost_table, stage_table
from tokenprune.cli.options import Json
from tokenprune.cli.options import output as output_option
from tokenprune.cli.visualize import draw
from tokenprune.cost.profile import profile
from tokenprune.cost.timing import interleaved
from tokenprune.errors import MissingDependencyError
from tokenprune.recipe import load_recipe
from tokenprune.wrapping import unwrap, wrap

__all__ = ["demo"]

RECIPE = "demo-digits-k0.7"
BATCHES = (1, 64)


def demo(
    output: Annotated[Path, output_option("Folder for all output.")] = Path("runs/demo"),
    dense_epochs: Annotated[int, typer.Option(min=1, help="Epochs of the dense host.")] = 8,
    epochs: Annotated[int | None, typer.Option(help="Overrides the recipe's epochs.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing.")] = 5,
    recipe: Annotated[str, typer.Option(help="Name or file; must name a host.")] = RECIPE,
    as_json: Json = False,
) -> None:
    """Train a small ViT on scikit-learn's digits, prune it, and report accuracy and speed."""
    try:
        from tokenprune.cli.run_input import write_input
        from tokenprune.cli.runs import prepare
        from tokenprune.train import evaluate, fit, pretrain
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"The demo needs {error.name}, which is not installed. "
            "Run: pip install 'tokenprune-torch[train]'"
        ) from error
    started = time.perf_counter()
    chosen = load_recipe(recipe)
    run = prepare(chosen, None, pretrained=False)
    intro = (
        f"{len(run.data.train)} digits to train on, {len(run.data.eval)} held out; "  # type: ignore[arg-type]
        f"{type(run.model).__name__} with "
        f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters."
    )
    if not as_json:
        say(intro)
    with bar("dense host") as step:
        pretrain(run.model, run.data, dense_epochs, progress=step, seed=chosen.train.seed)
    accuracy = {"dense": evaluate(run.model, run.data, path="dense")}
    dense_done = time.perf_counter()

    with working("tracing and proving"):
        model = wrap(run.model, chosen)
    with bar("pruned model") as step:
        fit(
            None,
            model,
            run.data,
            output / "training",
            epochs=epochs,
            resume=False,
            progress=step,
            save_every="never",
        )
    tuned_done = time.perf_counter()
    with working("evaluating and proving"):
        accuracy["pruned"] = evaluate(model, run.data, path="gather")
        accuracy["fine-tuned, nothing pruned"] = evaluate(model, run.data, path="dense")
        certificate = verify(model.eval())
        counted = profile(model)
    with bar("timing", unit="rounds") as step:
        timings = _time(model, run.data.eval, rounds, step)
    figures = Figures(
        images=len(run.data.eval),  # type: ignore[arg-type]
        accuracy=accuracy,
        counted=counted,
        num_keep=certificate.num_keep,
        timings=timings,
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=str(next(model.parameters()).device),
        seconds={
            "dense host": dense_done - started,
            "pruned model": tuned_done - dense_done,
            "evaluation and timing": time.perf_counter() - tuned_done,
        },
    )
    stages = stage_table(chosen, counted, certificate.num_keep)
    tables = [accuracy_table(figures), speed_table(figures), stages]
    details = [cost_table(counted), certificate_table(certificate), settings_table(figures)]
    checkpoint = save(model, output / "checkpoint", host=run.host)
    write_input(checkpoint, None, run)
    picture = output / "pruning.png"
    draw(model, run.data, count=10).save(picture, format="PNG")
    page = write(output / "report.html", counted, [*tables, *details], picture)
    facts = output / "figures.json"
    facts.write_text(json.dumps(figures.as_dict(), indent=2) + "\n", encoding="utf-8")
    written = {"checkpoint": checkpoint, "picture": picture, "report": page, "figures": facts}
    lines = [f"{name:<12} {path}" for name, path in written.items()]
    report(as_json, {**figures.as_dict(), "files": written}, *tables, details[-1], *lines)


def _time(model: Any, images: Any, rounds: int, step: Any) -> dict[int, dict[str, Any]]:
    """Time the dense host and the pruned model, interleaved, at each batch size."""
    host = unwrap(model).eval()
    device = next(host.parameters()).device
    found = {}
    for position, batch in enumerate(BATCHES):
        x = torch.stack([images[i % len(images)]["pixel_values"] for i in range(batch)]).to(device)

        def after(done: int, before: int = position * rounds) -> None:
            step(before + done + 1, rounds * len(BATCHES), {})

        with torch.no_grad():
            calls = {"dense": partial(host, x), "pruned": partial(model, x)}
            found[batch] = interleaved(calls, rounds=rounds, device=device, after_round=after)
    return found
