"""`tokenprune recipes` and `tokenprune adapters`: list what is shipped, or print one recipe."""

from importlib.resources import files

import typer

from tokenprune.cli.console import report
from tokenprune.cli.options import Json
from tokenprune.hosts.registry import list_adapters
from tokenprune.recipe import list_recipes, load_recipe
from tokenprune.report.table import Table

__all__ = ["adapters", "recipes"]

recipes = typer.Typer(help="List the shipped recipes, or show one.")


@recipes.callback(invoke_without_command=True)
def _list(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is not None:
        return
    rows, data = [], []
    for name in list_recipes():
        recipe = load_recipe(name)
        host = f"{recipe.host.library}:{recipe.host.model}" if recipe.host else "any"
        blocks = [stage.block for stage in recipe.resolved_stages]
        ratios = [stage.keep_ratio for stage in recipe.resolved_stages]
        shown = (", ".join(map(str, blocks)), ", ".join(f"{ratio:g}" for ratio in ratios))
        rows.append((name, host, recipe.mode, *shown))
        one = {"recipe": name, "host": host, "mode": recipe.mode}
        data.append({**one, "blocks": blocks, "keep_ratios": ratios})
    columns = ("recipe", "host", "mode", "before blocks", "kept share")
    note = "tokenprune recipes show NAME prints one; tokenprune train NAME runs it."
    report(as_json, data, Table(f"{len(rows)} recipes", columns, tuple(rows), note))


@recipes.command(name="show")
def _show(name: str) -> None:
    """Print a shipped recipe, or check and print a recipe file."""
    text = load_recipe(name).to_yaml()
    shipped = files("tokenprune.recipes").joinpath(f"{name}.yaml")
    if name in list_recipes() and shipped.is_file():  # as it was written, with its comments
        text = shipped.read_text(encoding="utf-8")
    typer.echo(text.rstrip("\n"))


def adapters(as_json: Json = False) -> None:
    """List the architecture adapters."""
    names = list_adapters()
    rows = []
    for name in names:
        library, _, family = name.rpartition("/")
        rows.append((name, library or "any", family if library else "any with a stack of blocks"))
    columns = ("adapter", "library", "family")
    data = [dict(zip(columns, row, strict=True)) for row in rows]
    report(as_json, data, Table(f"{len(names)} adapters", columns, tuple(rows)))
