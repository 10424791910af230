"""`tokenprune recipes` and `tokenprune adapters`: list what is shipped, or print one recipe."""

from importlib.resources import files

import typer

from tokenprune.cli.console import show
from tokenprune.hosts.registry import list_adapters
from tokenprune.recipe import list_recipes, load_recipe
from tokenprune.report.table import Table

__all__ = ["adapters", "recipes"]

recipes = typer.Typer(help="List the shipped recipes, or show one.")


@recipes.callback(invoke_without_command=True)
def _list(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is not None:
        return
    rows = []
    for name in list_recipes():
        recipe = load_recipe(name)
        host = f"{recipe.host.library}:{recipe.host.model}" if recipe.host else "any"
        blocks = ", ".join(str(stage.block) for stage in recipe.resolved_stages)
        ratios = ", ".join(f"{stage.keep_ratio:g}" for stage in recipe.resolved_stages)
        rows.append((name, host, recipe.mode, blocks, ratios))
    columns = ("recipe", "host", "mode", "before blocks", "kept share")
    note = "tokenprune recipes show NAME prints one; tokenprune train NAME runs it."
    show(Table(f"{len(rows)} recipes", columns, tuple(rows), note))


@recipes.command(name="show")
def _show(name: str) -> None:
    """Print a shipped recipe, or check and print a recipe file."""
    text = load_recipe(name).to_yaml()
    shipped = files("tokenprune.recipes").joinpath(f"{name}.yaml")
    if name in list_recipes() and shipped.is_file():  # as it was written, with its comments
        text = shipped.read_text(encoding="utf-8")
    typer.echo(text.rstrip("\n"))


def adapters() -> None:
    """List the architecture adapters."""
    names = list_adapters()
    rows = []
    for name in names:
        library, _, family = name.rpartition("/")
        rows.append((name, library or "any", family if library else "any with a stack of blocks"))
    show(Table(f"{len(names)} adapters", ("adapter", "library", "family"), tuple(rows)))
