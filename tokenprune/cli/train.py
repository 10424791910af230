"""`tokenprune train`: wrap the host of a recipe, train it, save it."""

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.checkpoints.directory import save
from tokenprune.cli.console import bar, is_main_process, report, working
from tokenprune.cli.hosts import host_section
from tokenprune.cli.options import Json
from tokenprune.cli.options import output as output_option
from tokenprune.errors import HostError, UnsupportedHostError
from tokenprune.recipe import load_recipe
from tokenprune.wrapping import unwrap, wrap

__all__ = ["train"]

DENSE_BATCH = 32


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of images: train/ and val/ with one subfolder per class, or idx files "
            "like MNIST's. Default: scikit-learn's digits."
        ),
    ] = None,
    output: Annotated[
        Path | None, output_option("Folder of checkpoints. Default: runs/RECIPE.")
    ] = None,
    model: Annotated[str, typer.Option(help="Another host: timm:NAME or transformers:TYPE.")] = "",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="KEY=VALUE for building that host; may be repeated."),
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Start from random weights, not the published ones.")
    ] = False,
    host_weights: Annotated[
        Path | None, typer.Option(help="Start from these weights of the dense host.")
    ] = None,
    dense_epochs: Annotated[
        int, typer.Option(min=0, help="Train the dense host from scratch first, in OUTPUT/dense.")
    ] = 0,
    epochs: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    accumulation_steps: Annotated[
        int, typer.Option(min=1, help="Backward passes per optimiser step.")
    ] = 1,
    image_size: Annotated[int | None, typer.Option(help="Overrides the recipe.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Resume from the newest checkpoint in the output folder.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Train the predictors and the host of a recipe; resume an interrupted run.

    On several processes: torchrun --nproc-per-node 2 --no-python tokenprune train RECIPE
    """
    from tokenprune.cli.run_input import write_input
    from tokenprune.cli.runs import load_host_weights, prepare
    from tokenprune.cli.scores import scores
    from tokenprune.train import fit, pretrain
    from tokenprune.train.arguments import with_overrides
    from tokenprune.train.run_folder import newest_checkpoint

    chosen = load_recipe(recipe)
    if model:
        chosen = chosen.model_copy(update={"host": host_section(model, option or ())})
    elif option:
        raise HostError("--option is for building another host; name it with --model.")
    chosen = with_overrides(chosen, epochs=epochs, batch_size=batch_size, seed=seed)
    folder = output or Path("runs") / (chosen.name or "train")
    published = not (scratch or host_weights or dense_epochs)
    with working("building host, reading images"):
        try:
            run = prepare(chosen, data, pretrained=published, image_size=image_size)
        except (HostError, UnsupportedHostError) as error:
            if not published:
                raise
            raise type(error)(
                f"{error}\nIf there are no published weights, start from a file (--host-weights "
                "FILE), train the dense host first (--dense-epochs N), or take random weights "
                "(--scratch)."
            ) from error
        if host_weights is not None:
            load_host_weights(run.model, host_weights)
    with working("wrapping"):
        wrapped = wrap(run.model, chosen)
    if dense_epochs and not (resume and newest_checkpoint(folder)):
        with bar("dense host") as step:
            pretrain(
                unwrap(wrapped),
                run.data,
                dense_epochs,
                batch_size=batch_size or DENSE_BATCH,
                progress=step,
                num_workers=workers,
                mixed_precision=chosen.train.mixed_precision,
                seed=chosen.train.seed,
                output_dir=folder / "dense",
                resume=resume,
            )
    with bar("pruned model") as step:
        fit(
            None,
            wrapped,
            run.data,
            folder,
            accumulation_steps=accumulation_steps,
            resume=resume,
            progress=step,
            num_workers=workers,
        )
    if is_main_process():
        write_input(folder, data, run)
        save(wrapped, folder, host=run.host)
        with bar("evaluating", "images") as step:
            found, table = scores(wrapped, run.data, progress=step)
        lines = (f"checkpoint   {folder}", f"next         tokenprune visualize {folder}")
        report(as_json, {**found, "folder": folder}, table, *lines)
