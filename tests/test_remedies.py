"""What a refusal recommends works: the call is taken from its message and run."""

import ast
import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tokenprune
from tokenprune import errors
from tokenprune.hosts.registry import describe
from tokenprune.recipe import Recipe
from tokenprune.runtime.model import pruning_of
from tokenprune.scorers import SCORERS

ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.5}}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:untrained predictors")


def vit() -> Any:
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL).eval()


@cache
def _wrapped() -> Any:
    return tokenprune.wrap(vit(), RECIPE, verify=False, train=False).eval()


def wrapped() -> Any:
    return copy.deepcopy(_wrapped())


Names = dict[str, Any]
Case = tuple[str, Callable[[Names], Any], str | None]


def called(name: str, *args: Any, **kwargs: Any) -> Callable[[Names], Any]:
    """A call of a method of the model."""
    return lambda names: getattr(names["model"], name)(*args, **kwargs)


def jit_trace(names: Names) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(names["model"], names["images"])


def legacy_onnx(names: Names) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(names["model"], (names["images"],), "x.onnx", dynamo=False)


def offloaded(names: Names) -> Any:
    accelerate.cpu_offload(names["host"], execution_device="cpu")
    return tokenprune.wrap(names["host"], RECIPE, verify=False, train=False)


def moved_alone(names: Names) -> Any:
    tokenprune.unwrap(names["model"]).double()
    return names["model"](names["images"].double())


def frozen(names: Names) -> Any:
    names["model"].token_predictors.requires_grad_(False)
    return lambda: tokenprune.calibrate(
        names["model"], names["batches"], fit_steps=2, progress=False
    )


def frozen_calibrated(names: Names) -> Any:
    if "frozen" not in names:
        names["frozen"] = frozen(names)
    return names["frozen"]()


def by_threshold(names: Names) -> Any:
    if "jagged" not in names:
        names["jagged"] = names["model"].set_threshold(0.4)
    return tokenprune.export(names["model"], names["folder"] / "x.pt2", check=False)


def on_meta(names: Names) -> Any:
    if "host_on_meta" not in names:
        tokenprune.save(names["model"], names["folder"] / "saved")
        with torch.device("meta"):
            names["host"] = names["host_on_meta"] = vit()
    return tokenprune.load(names["folder"] / "saved", names["host"], verify=False, train=False)


def no_library(names: Names) -> Any:
    host = timm.models.vision_transformer.VisionTransformer(num_classes=5, **SMALL).eval()
    names["host"] = host
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False)
    return tokenprune.load(tokenprune.save(model, names["folder"] / "saved"))


def weights_alone(names: Names) -> Any:
    save_file(names["model"].state_dict(), names["folder"] / "model.safetensors")
    return tokenprune.load(names["folder"], names["host"])


def class_tokenless(names: Names) -> Any:
    names["host"] = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, class_token=False, global_pool="avg", **SMALL
    ).eval()
    return tokenprune.wrap(names["host"], "evit-k0.7", verify=False, train=False)


class Talks(nn.Module):
    """A tower, and Python that decides by what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = vit()

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.vision_tower(x)
        return seen if seen.sum() > 0 else -seen


def a_tower(names: Names) -> Any:
    names["host"] = Talks()
    return tokenprune.wrap(names["host"], RECIPE, example_inputs=IMAGES)


CASES: dict[str, Case] = {
    # what is refused, and a call in its message; None where another call of the same is run again
    "jit.trace": ("HostError", jit_trace, r'tokenprune\.export\(model, "model\.pt2"\)'),
    "torch.fx": (
        "HostError",
        lambda names: torch.fx.symbolic_trace(names["model"]),
        r'tokenprune\.export\(model, "model\.pt2"\)',
    ),
    "a tower": ("TraceError", a_tower, r"tokenprune\.wrap\(host\.[\w.]+, restore=True\)"),
    "wrapped twice": (
        "AlreadyWrappedError",
        lambda names: tokenprune.wrap(names["model"], RECIPE),
        r"tokenprune\.unwrap\(model\)",
    ),
    "wrapped twice, other ratio": (
        "AlreadyWrappedError",
        lambda names: tokenprune.wrap(names["model"], RECIPE),
        r"model\.set_keep_ratio\(0\.5\)",
    ),
    "a host where a model is needed": (
        "NotWrappedError",
        lambda names: tokenprune.profile(names["host"]),
        r"tokenprune\.wrap\(model, recipe\)",
    ),
    "too small a budget": (
        "PlanError",
        called("set_budget", 0.01),
        r"model\.set_budget\([\d.]+\)",
    ),
    "host moved alone": ("HostError", moved_alone, r'model\.to\("cpu", torch\.float64\)'),
    "frozen predictors": (
        "PlanError",
        frozen_calibrated,
        r"model\.token_predictors\.requires_grad_\(True\)",
    ),
    "export by threshold": ("PlanError", by_threshold, r"model\.set_threshold\(None\)"),
    "host on meta": ("CheckpointError", on_meta, r'host\.to_empty\(device="cpu"\)'),
    "a host that no library builds": (
        "CheckpointError",
        no_library,
        r"tokenprune\.load\('.*', host\)",
    ),
    "a Trainer's folder": (
        "CheckpointError",
        weights_alone,
        r"tokenprune\.load\('.*', host, recipe=\.\.\.\)",
    ),
    "no class token": ("PlanError", class_tokenless, r"merge-k0\.7"),
    "unknown recipe": (
        "UnknownRecipeError",
        lambda names: tokenprune.wrap(names["host"], "merge-0.7"),
        r"(?<=Did you mean ')[\w.-]+(?=')",
    ),
    "unknown adapter": (
        "UnknownAdapterError",
        lambda names: describe(names["host"], "timm/vision_transforme"),
        r"(?<=Did you mean ')[\w./-]+(?=')",
    ),
    "a name that is taken": (
        "RegistrationError",
        lambda names: SCORERS.register("random")(SCORERS["random"]),
        r"replace=True",
    ),
}
AGAIN = {"host moved alone", "frozen predictors", "export by threshold", "host on meta"}
"""Of which the remedy is a step after which the same call works."""
IN_WORDS: dict[str, Callable[[str, Names], Any]] = {
    "merge-k0.7": lambda name, names: tokenprune.wrap(
        names["host"], name, verify=False, train=False
    ),
    "unknown recipe": lambda name, names: (
        tokenprune.Recipe.parse(RECIPE)
        and tokenprune.wrap(names["host"], name, verify=False, train=False)
    ),
    "unknown adapter": lambda name, names: describe(names["host"], name),
    "a name that is taken": lambda text, names: SCORERS.register("random", **eval(f"dict({text})"))(
        SCORERS["random"]
    ),
}
IN_WORDS["no class token"] = IN_WORDS["merge-k0.7"]


@pytest.mark.parametrize("name", CASES)
def test_the_recommended_call_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, provoke, recommended = CASES[name]
    names: Names = {"model": wrapped(), "host": vit(), "images": IMAGES, "batches": [IMAGES]}
    names |= {"folder": tmp_path, "torch": torch, "tokenprune": tokenprune, "recipe": RECIPE}
    with pytest.raises(getattr(errors, kind)) as caught:
        provoke(names)
    found = re.search(str(recommended), str(caught.value))
    assert found is not None, str(caught.value)
    if name in IN_WORDS:
        IN_WORDS[name](found[0], names)
        return
    if kind == "NotWrappedError":
        names["model"] = names["host"]
    result = eval(found[0].replace("recipe=...", "recipe=recipe"), names)
    if name in AGAIN:
        result = provoke(names)
    if isinstance(result, nn.Module) and name != "frozen predictors":
        result.eval()(IMAGES.to(next(result.parameters()).dtype))


def test_the_old_exporter_names_the_new_one() -> None:
    with pytest.raises(errors.HostError, match=r'tokenprune\.export\(model, "model\.onnx"\)'):
        legacy_onnx({"model": wrapped(), "images": IMAGES})


def test_offloading_has_an_order() -> None:
    host = vit()
    with pytest.raises(errors.UnsupportedHostError) as caught:
        offloaded({"host": host})
    steps = re.findall(
        r"((?:model = )?(?:accelerate|tokenprune)\.[\w.]+\([\w, ]+\))", str(caught.value)
    )
    assert len(steps) == 3, str(caught.value)
    names: Names = {"host": host, "accelerate": accelerate, "tokenprune": tokenprune}
    names["recipe"] = RECIPE
    names["model"] = None
    message = str(caught.value).replace("model = tokenprune", "model=tokenprune")
    assert (
        message.index("remove_hook") < message.index("tokenprune.wrap") < message.index("cpu_off")
    )
    exec("\n".join(steps), names)
    with torch.no_grad():
        names["model"].eval()(IMAGES)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"schedule": {"keep_ratio": 0.7, "mode": "merge"}}, {"mode": "merge"}),
        ({"schedule": {"keep_ratio": 0.7, "selection": "threshold"}}, None),
        ({"schedule": {"keep_ratio": 0.7}, "noise": "spread"}, None),
        ({"schedule": {"keep_ratio": 0.7}, "epochs": 3}, None),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_place(wrong: Any, right: Any) -> None:
    with pytest.raises(errors.RecipeError) as caught:
        Recipe.parse({"version": 1, **wrong})
    found = re.search(r"Put `(\w+)` at the top level|Put it into `(\w+)`", str(caught.value))
    assert found is not None, str(caught.value)
    fixed = copy.deepcopy({"version": 1, **wrong})
    problem = caught.value.problems[0].partition(":")[0].split(".")
    inside = fixed
    for part in problem[:-1]:
        inside = inside[part]
    value = inside.pop(problem[-1])
    if found[1]:
        fixed[problem[-1]] = value
    else:
        fixed.setdefault(found[2], {})[problem[-1]] = value
    assert Recipe.parse(fixed)
    assert right is None or fixed.items() >= right.items()


def test_advice_of_a_comparison_of_a_wrapped_model_runs() -> None:
    model = wrapped()
    found = tokenprune.compare(
        model, [IMAGES], methods=["merge-k0.7"], macs=[0.8], timed=False, progress=False
    )
    names: Names = {"model": model, "tokenprune": tokenprune}
    other = next(row for row in found.rows if row.method == "merge-k0.7")
    near = replace(other, trial=replace(other.trial, divergence=-1.0))
    exec(replace(found, rows=(near, *found.rows)).advice(0.8), names)
    assert pruning_of(names["model"]).recipe.mode == "merge"


IMPERATIVES = (  # noqa: SIM905
    "Add Ask Build Call Change Check Choose Compare Compile Define Delete Draw Evaluate Export "
    "Fetch Freeze Get Give Install Keep Leave Let List Load Make Move Name Pass Put Quantize Read "
    "Remove Rename Resize Restore Resume Run Save Say Set Take Train Use Wrap Write"
).split()
ADVICE = re.compile(
    rf"(?:^|[.;:!?,] |\n|`|\(|\}} |or )(?:{'|'.join(IMPERATIVES)}|"
    rf"{'|'.join(word.lower() for word in IMPERATIVES)})\b"
)
HINTS = {"hint", "what", "advice", "reason", "why", "where", "do", "tail", "unknown"}
"""Names of parts of a message that say what to do."""
OF_HOSTS = {"analysis", "tracing", "rewrite"}
"""They refuse the code of a host, and name its line: there is no call to recommend."""


def raised() -> list[tuple[str, str]]:
    """Place and text of every error that is raised with a text that stands there."""
    classes = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    found = []
    for folder in (ROOT / "tokenprune", ROOT / "adapters"):
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                call = node.exc if isinstance(node, ast.Raise) else None
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                text = call.args[0]
                name = ast.unparse(call.func).rpartition(".")[2]
                if name in classes | {"DataError"} and isinstance(
                    text, ast.Constant | ast.JoinedStr
                ):
                    place = f"{file.relative_to(ROOT)}:{node.lineno}"
                    found.append((place, _text(text)))
    return found


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            name = ast.unparse(part.value)
            hint = name in HINTS or name.startswith("did_you_mean")
            parts.append(". Use x" if hint else "x")
        else:
            parts.append(str(ast.literal_eval(part)))
    return "".join(parts)


def test_every_message_says_what_to_do() -> None:
    texts = raised()
    assert len(texts) > 150
    lacking = [
        f"{place} {text}"
        for place, text in texts
        if OF_HOSTS.isdisjoint(Path(place.partition(":")[0]).parts)
        and not ADVICE.search(text)
        and not text.endswith(":")  # the faults follow, each with its own
    ]
    assert lacking == [], "\n".join(lacking)
