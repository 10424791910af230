"""`tokenprune recipes`: list the shipped recipes, or print one."""

from importlib.resources import files

import typer

from tokenprune.cli.console import show
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.report.table import Table

__all__ = ["recipes"]

recipes = typer.Typer(help="List the shipped recipes, or show one.")


@recipes.callback(invoke_without_command=True)
def _list(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is not None:
        return
    names = list_recipes()
    rows = tuple(_row(name, load_recipe(name)) for name in names)
    columns = ("recipe", "host", "mode", "before blocks", "kept share")
    note = "tokenprune recipes show NAME prints one; tokenprune train NAME runs it."
    show(Table(f"{len(names)} recipes", columns, rows, note))


@recipes.command(name="show")
def _show(name: str) -> None:
    """Print a shipped recipe, or check and print a recipe file."""
    recipe = load_recipe(name)
    shipped = name in list_recipes()
    if shipped:
        text = files("tokenprune.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        text = recipe.to_yaml()
    typer.echo(text.rstrip("\n"))


def _row(name: str, recipe: Recipe) -> tuple[str, ...]:
    stages = recipe.resolved_stages
    host = f"{recipe.host.library}:{recipe.host.model}" if recipe.host else "any"
    blocks = ", ".join(str(stage.block) for stage in stages)
    ratios = ", ".join(f"{stage.keep_ratio:g}" for stage in stages)
    return name, host, recipe.mode, blocks, ratios
