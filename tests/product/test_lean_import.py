"""`import tokenprune`, and the whole core, bring in neither a model library nor a plotting one."""

import subprocess
import sys

HEAVY = {
    "accelerate",
    "matplotlib",
    "onnx",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
    "typer",
}

# These stand on top of the core and may import the library they are about.
OUTSIDE_THE_CORE = ("adapters", "cli", "models", "report", "train")

IMPORT_THE_CORE = f"""
import importlib, pathlib, tokenprune
root = pathlib.Path(tokenprune.__file__).parent
for path in root.rglob("*.py"):
    parts = path.relative_to(root.parent).with_suffix("").parts
    if parts[1] not in {OUTSIDE_THE_CORE} and parts[-1] != "__main__":
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
"""


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` of a fresh interpreter that ran `code`."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return set(run.stdout.split())


def test_import_is_light() -> None:
    loaded = modules_after(f"{IMPORT_THE_CORE}\ntokenprune.list_recipes()")
    assert {"tokenprune.recipe.yaml", "tokenprune.recipes"} <= loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_check_sees_a_heavy_import() -> None:
    assert "timm" in modules_after("import timm")
