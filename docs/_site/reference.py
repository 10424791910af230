"""The pages of the reference: which names they show. mkdocstrings writes what is shown of each."""

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["PAGES"]

API = """# Functions and classes

What `import tokenprune` gives. Shapes are in brackets: B images, L tokens, of which P are prefix
and N patch tokens, K kept ones, D channels, H heads. Times are in seconds, memory is in bytes, MACs
are multiply-accumulates.
"""
METHODS = """They are in `tokenprune.methods`. Each is a frozen object with a name that `wrap`,
recipes and the command line take: `ToMe(r=13)` is `tome-r13`, `Merge(keep_ratio=0.7)` is
`merge-k0.7`, `Auto()` is `auto`. All but `ToMe` have one field, `keep_ratio` in (0, 1], 0.7 if it
is not given: the share that each of three stages keeps of what it sees (`MergeFalling` leaves as
many in the end).
"""
MODEL = """
## What a wrapped model has beside its host's names

Call it as the host, or with `return_trace=True`, which also returns a
[PruningTrace][tokenprune.PruningTrace].
"""


def _api(root: Path) -> str:
    """One entry for each name that `tokenprune/__init__.py` exports, functions first."""
    tree = ast.parse((root / "tokenprune" / "__init__.py").read_text(encoding="utf-8"))
    exported = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    modules = {"errors", "losses", "methods"}  # these have pages of their own
    names = [name for name in exported if name not in modules]
    first = ["wrap", "unwrap", "verify", "compare", "calibrate", "benchmark", "profile"]
    functions = [name for name in names if name[0].islower()]
    functions.sort(key=lambda name: first.index(name) if name in first else len(first))
    classes = [name for name in names if not name[0].islower()]
    shown = [_entry(f"tokenprune.{name}") for name in (*functions, *classes)]
    model = "tokenprune.runtime.model.PrunedModel"
    methods = ("using", "set_budget", "set_keep_ratio", "set_threshold")
    own = [_entry(f"{model}.{name}", heading_level=3) for name in methods]
    return "\n".join([API, *shown[: len(functions)], MODEL, *own, *shown[len(functions) :]])


def _listed(
    title: str, text: str, names: Sequence[str], **options: object
) -> Callable[[Path], str]:
    page = "\n".join([f"# {title}\n\n{text}\n", *(_entry(name, **options) for name in names)])
    return lambda root: page


def _entry(name: str, **options: object) -> str:
    lines = [f"      {key}: {value}" for key, value in options.items()]
    return "\n".join([f"::: {name}", *(["    options:", *lines] if lines else []), ""])


def _public(root: Path, module: str) -> list[str]:
    """The names in a module's `__all__`."""
    path = root / (module.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{module} has no __all__")


def _methods(root: Path) -> str:
    names = _public(root, "tokenprune.recipe.methods")
    shown = [f"tokenprune.recipe.methods.{name}" for name in names]
    return _listed("Methods", METHODS, shown, show_bases="false")(root)


def _losses(root: Path) -> str:
    names = [f"tokenprune.losses.{name}" for name in _public(root, "tokenprune.losses")]
    text = "What a training loop needs: [`for_model`][tokenprune.losses.for_model] is all of it."
    return _listed("Losses", text, sorted(names, key=lambda n: not n.endswith("for_model")))(root)


def _errors(root: Path) -> str:
    names = [n for n in _public(root, "tokenprune.errors") if n.endswith(("Error", "Warning"))]
    names.sort(key=lambda name: not name.startswith("TokenPrune"))
    shown = [f"tokenprune.errors.{name}" for name in names]
    text = "Classes in `tokenprune.errors`; [causes and remedies](errors.md) of each."
    return _listed("Error classes", text, [*shown, "tokenprune.train.folders.DataError"])(root)


def _train(root: Path) -> str:
    """Where the names that `tokenprune.train` imports when they are first used are defined."""
    tree = ast.parse((root / "tokenprune" / "train" / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_NAMES"
    )
    names = [f"{module}.{name}" for module, given in homes.items() for name in given]
    text = "What `tokenprune train` runs; all of it is in `tokenprune.train` (extra `train`)."
    return _listed("Training", text, [n for n in names if not n.endswith("Error")])(root)


SEAMS = (
    "tokenprune.scorers.protocol.Scorer",
    "tokenprune.scorers.protocol.Matcher",
    "tokenprune.scorers.protocol.Need",
    "tokenprune.reductions.protocol.Reduction",
    "tokenprune.reductions.protocol.Proof",
    "tokenprune.rewrite.passes.Pass",
    "tokenprune.rewrite.rules.rule",
    "tokenprune.rewrite.rules.hide_in_reduction",
    "tokenprune.hosts.registry.Adapter",
    "tokenprune.registry.Registry",
)

RECIPE = (
    "tokenprune.recipe.recipe.Recipe",
    *(
        f"tokenprune.recipe.schema.{name}"
        for name in (
            *("Stage", "ScheduleSection", "PredictorSection", "SamplingSection", "LossSection"),
            *("TrainSection", "HostSection"),
        )
    ),
)

PAGES: dict[str, Callable[[Path], str]] = {
    "api.md": _api,
    "api-methods.md": _methods,
    "api-losses.md": _losses,
    "api-train.md": _train,
    "api-errors.md": _errors,
    "api-recipe.md": _listed(
        "Every key of a recipe", "`schedule`, `loss` and so on, as sections.", RECIPE
    ),
    "api-seams.md": _listed("Seams", "What code of your own implements; [how](extend.md).", SEAMS),
}
