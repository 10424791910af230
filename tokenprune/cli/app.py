"""The typer application: its commands, and the exit code of an error.

Exit codes: 0 done, 1 an error that is a fault of this library or its machine, 2 an error that the
message says how to mend, 130 interrupted.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokenprune import __version__
from tokenprune.cli.benchmark import benchmark
from tokenprune.cli.console import say, show_error
from tokenprune.cli.convert import register as register_convert
from tokenprune.cli.demo import demo
from tokenprune.cli.env import env
from tokenprune.cli.evaluate import evaluate
from tokenprune.cli.export import export
from tokenprune.cli.inspect import inspect
from tokenprune.cli.lists import adapters, recipes
from tokenprune.cli.train import train
from tokenprune.cli.tune import calibrate, compare
from tokenprune.cli.visualize import visualize
from tokenprune.errors import TokenPruneError

__all__ = ["app"]

FAULT, MENDABLE = 1, 2
INTERNAL = (
    "{kind}: {error}\nThis is a fault of tokenprune, or of what it runs on. "
    "`tokenprune --debug COMMAND ...` shows where; report it with the output of `tokenprune env`."
)


class _Group(TyperGroup):
    """Prints an error as one message, without its traceback, and exits with its code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TokenPruneError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            raise typer.Exit(MENDABLE) from None
        except BrokenPipeError:  # `tokenprune ... | head`: click ends quietly
            raise
        except Exception as error:
            # what typer and click raise by themselves they also show
            if ctx.params.get("debug") or type(error).__module__.startswith(("click", "typer")):
                raise
            show_error(INTERNAL.format(kind=type(error).__name__, error=error))
            raise typer.Exit(FAULT) from None


START = """\b
Start with one of these:
  tokenprune demo
      Train, prune and prove a small model on digits.
  tokenprune benchmark deit_small_patch16_224 --recipe merge-k0.7
      What pruning gains on this machine.
  tokenprune compare deit_small_patch16_224 --pretrained --data IMAGES
      What each method costs and loses on your own images, without training.

\b
Exit codes: 0 done; 1 a fault of tokenprune or of the machine (--debug shows where);
2 a mistake that the message says how to mend; 130 interrupted."""

app = typer.Typer(
    name="tokenprune",
    cls=_Group,
    help="Token pruning and merging for existing vision transformers.",
    epilog=START,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"tokenprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of all commands."""


app.command()(demo)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(inspect)
app.command()(benchmark)
app.command()(compare)
app.command()(calibrate)
app.command()(export)
app.add_typer(recipes, name="recipes")
app.command()(adapters)
app.command()(visualize)
register_convert(app)
app.command()(env)
