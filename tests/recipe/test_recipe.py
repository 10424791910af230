"""Recipes: the shipped files, and the message of every way to get one wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tokenprune
from tokenprune.errors import RecipeError, UnknownRecipeError
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.recipe.counting import num_keep

FOLDER = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path.stem for path in FOLDER.rglob("*.yaml"))
RATIOS = ("0.5", "0.7", "0.8", "0.9")
MINIMAL = {"version": 1, "schedule": {"blocks": [3, 6, 9], "keep_ratio": 0.7}}

# host -> ratios shipped, blocks, ratio weight, drop path, epochs, batch, rate, backbone scale
PUBLISHED = {
    "deit-256": (RATIOS, (3, 6, 9), 2.0, 0.0, 30, 1024, 1e-3, 0.01),
    "deit-tiny": (RATIOS, (3, 6, 9), 2.0, 0.0, 30, 1024, 1e-3, 0.01),
    "deit-small": (RATIOS, (3, 6, 9), 2.0, 0.0, 30, 1024, 1e-3, 0.01),
    "deit-base": (RATIOS, (3, 6, 9), 5.0, 0.2, 30, 1024, 1e-3, 0.01),
    "lvvit-s": (RATIOS, (4, 8, 12), 2.0, 0.0, 30, 1024, 1e-3, 0.01),
    "lvvit-m": (RATIOS, (5, 10, 15), 2.0, 0.0, 30, 1024, 1e-3, 0.01),
    "swin-tiny": (("0.7", "0.9"), (5, 6, 7), 10.0, 0.2, 120, 4096, 4e-3, 0.2),
    "swin-small": (("0.7", "0.9"), (6, 8, 10), 10.0, 0.2, 120, 4096, 4e-3, 0.2),
    "swin-base": (("0.7", "0.9"), (6, 8, 10), 10.0, 0.5, 120, 4096, 4e-3, 0.2),
}
PUBLISHED_NAMES = [
    (host, ratio, f"dynamicvit-{host}-k{ratio}")
    for host, row in PUBLISHED.items()
    for ratio in row[0]
]


def test_every_shipped_file_is_found_and_nothing_else() -> None:
    names = list_recipes()
    assert names[: len(SHIPPED)] == SHIPPED
    assert names[len(SHIPPED) :] == tokenprune.methods.list_methods()
    assert len(PUBLISHED_NAMES) == 30
    assert {name for _, _, name in PUBLISHED_NAMES} <= set(SHIPPED)
    assert all(path.parent == FOLDER for path in FOLDER.rglob("*.yaml")), "keep recipes/ flat"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_parses_round_trips_and_names_its_command(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.source
    assert recipe.host is not None
    assert Recipe.from_text(recipe.to_yaml()) == recipe

    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("version:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(r"# Run it: .*tokenprune ", header)
    assert "# Source:" in header


@pytest.mark.parametrize(("host", "ratio", "name"), PUBLISHED_NAMES)
def test_published_model_has_the_places_and_schedule_of_the_authors(
    host: str, ratio: str, name: str
) -> None:
    _, blocks, ratio_weight, drop_path, epochs, batch, rate, scale = PUBLISHED[host]
    recipe, rho = load_recipe(name), float(ratio)
    swin = host.startswith("swin")
    expected = [rho, rho - 0.2, rho - 0.4] if swin else [rho, rho**2, rho**3]

    assert recipe.mode == ("bypass" if swin else "remove")
    assert tuple(stage.block for stage in recipe.resolved_stages) == blocks
    assert [stage.keep_ratio for stage in recipe.resolved_stages] == pytest.approx(expected)
    assert recipe.loss.ratio == ratio_weight
    assert recipe.loss.token_distance == ("kl" if host.startswith("lvvit") else "mse")
    assert recipe.loss.token_set == ("all" if swin else "kept")
    train = recipe.train
    assert (train.drop_path, train.epochs, train.batch_size) == (drop_path, epochs, batch)
    assert (train.learning_rate, train.backbone_lr_scale) == (rate, scale)
    assert (train.frozen_epochs, train.mixed_precision, train.ema_decay) == (5, "no", 0.9999)

    counts = [196, *(num_keep(196, stage.keep_ratio) for stage in recipe.resolved_stages)]
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"At 224 pixels: {' -> '.join(map(str, counts))} " in header
    assert f"tokenprune train {name} --data DIR" in header


def test_schedule_is_short_for_stages() -> None:
    long = Recipe.parse(
        {
            "version": 1,
            "stages": [
                {"block": 3, "keep_ratio": 0.7},
                {"block": 6, "keep_ratio": 0.49},
                {"block": 9, "keep_ratio": 0.343},
            ],
        }
    )
    assert Recipe.parse(MINIMAL).resolved_stages == long.resolved_stages


def test_recipes_are_immutable() -> None:
    recipe = Recipe.parse(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.mode = "bypass"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 1  # type: ignore[misc]


def test_load_recipe_takes_a_name_a_path_a_mapping_or_a_recipe(tmp_path: Path) -> None:
    recipe = Recipe.parse(MINIMAL)
    file = tmp_path / "mine.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(recipe) is recipe
    assert load_recipe(MINIMAL) == recipe
    assert load_recipe(file) == recipe
    assert load_recipe(str(file)) == recipe
    assert load_recipe("dynamicvit-deit-small-k0.7").resolved_stages == recipe.resolved_stages


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(
        UnknownRecipeError,
        match=r"No recipe is named 'dynamicvit-deit-smal-k0\.7'\. Did you mean "
        r"'dynamicvit-deit-small-k0\.7'",
    ):
        load_recipe("dynamicvit-deit-smal-k0.7")
    with pytest.raises(LookupError, match="Known names: "):
        load_recipe("zzz")


@pytest.mark.parametrize("name", ["absent.yaml", "absent.yml", "absent/recipe"])
def test_missing_file_says_how_to_name_a_shipped_recipe(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"no recipe file '{name}'.*list_recipes\(\)"):
        load_recipe(name)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Cannot read recipe file .*: .*directory"):
        Recipe.load(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match=r"Cannot read recipe file '.*binary\.yaml': .*decode"):
        Recipe.load(binary)


def test_faults_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "faulty.yaml"
    file.write_text("version: 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"There is 1 fault in recipe file '.*faulty\.yaml':"):
        load_recipe(file)


@pytest.mark.parametrize("source", [7, None, ["version", 1]])
def test_something_that_is_no_recipe_is_named_by_type(source: Any) -> None:
    with pytest.raises(RecipeError, match=f"found {type(source).__name__}"):
        load_recipe(source)


@pytest.mark.parametrize(
    ("version", "found"),
    [("version: 2", "version 2"), ("version: true", "version True"), ("name: x", "no `version`")],
)
def test_another_version_is_refused(version: str, found: str) -> None:
    with pytest.raises(RecipeError, match=rf"Found {found}.*reads `version: 1` only"):
        Recipe.from_text(version)


@pytest.mark.parametrize("text", ["", "[1, 2]", "just text", "3"])
def test_text_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="A recipe must be a mapping of keys"):
        Recipe.from_text(text)


STAGES = "version: 1\nstages:\n"
SCHEDULE = "version: 1\nschedule: {blocks: [3], keep_ratio: 0.7}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("version: 1", "give exactly one of `stages` and `schedule`, found neither"),
        (
            SCHEDULE + "stages: [{block: 1, keep_ratio: 1}]",
            "give exactly one of `stages` and `schedule`, found both",
        ),
        ("version: 1\nstages: []", "stages: there is no stage; give at least one block"),
        ("version: 1\nstages: 3", "stages: should be a list, found 3"),
        (
            "version: 1\nschedule: {blocks: [], keep_ratio: 1}",
            "schedule.blocks: there is no stage; give at least one block",
        ),
        (
            "version: 1\nschedule: {blocks: [3, 3], keep_ratio: 1}",
            "schedule.blocks: two stages are at block 3; leave one of them out",
        ),
        ("version: 1\nschedule: [3]", "schedule: should be a mapping of keys, found [3]"),
        (
            STAGES + "  - {block: 3, keep_ratio: 0.7}\n  - {block: 3, keep_ratio: 0.5}",
            "stages: two stages are at block 3; leave one of them out",
        ),
        (
            STAGES + "  - {block: 6, keep_ratio: 0.7}\n  - {block: 3, keep_ratio: 0.5}",
            "stages: block 3 comes after block 6; order stages by block",
        ),
        (
            STAGES + "  - {block: 3, keep_ratio: 0.5}\n  - {block: 6, keep_ratio: 0.7}",
            "stages: keep_ratio grows from 0.5 at block 3 to 0.7 at block 6; it is the share of "
            "the original tokens, so it must not grow",
        ),
        (
            STAGES + "  - {block: 3, keep_ratio: 0}",
            "stages.0.keep_ratio: should be greater than 0, found 0",
        ),
        (
            STAGES + "  - {block: 3, keep_ratio: 1.1}",
            "stages.0.keep_ratio: should be less than or equal to 1, found 1.1",
        ),
        (
            STAGES + "  - {block: 3, keep_ratio: .nan}",
            "stages.0.keep_ratio: should be a finite number, found nan",
        ),
        (
            STAGES + "  - {block: 3, keep_ratio: '0.7'}",
            "stages.0.keep_ratio: should be a valid number, found '0.7'",
        ),
        (
            STAGES + "  - {block: -1, keep_ratio: 1}",
            "stages.0.block: should be greater than or equal to 0, found -1",
        ),
        (STAGES + "  - {keep_ratio: 1}", "stages.0.block: this key is missing"),
        (
            STAGES + "  - {block: 3, keep_ration: 1, keep_ratio: 1}",
            "stages.0.keep_ration: unknown key. Did you mean 'keep_ratio'?",
        ),
        (SCHEDULE + "predictro: {}", "predictro: unknown key. Did you mean 'predictor'"),
        (
            SCHEDULE + "train: {warmup_epoch: 3}",
            "train.warmup_epoch: unknown key. Did you mean 'warmup_epochs'",
        ),
        (
            SCHEDULE + "predictor: {qqq: 3}",
            "predictor.qqq: unknown key. Known names: activation.",
        ),
        (
            SCHEDULE + "mode: drop",
            "mode: There is no mode named 'drop'. Known names: bypass, exact, fuse, merge, remove, "
            "skip, windows.",
        ),
        (SCHEDULE + "sampling: {rounding: up}", "sampling.rounding: should be 'floor', 'ceil' or"),
        (
            SCHEDULE + "sampling: {temperature: 0}",
            "sampling.temperature: should be greater than 0, found 0",
        ),
        (SCHEDULE + "train: {rand_augment: max}", "train.rand_augment: String should match"),
        (SCHEDULE + "train: {epochs: 3.5}", "train.epochs: should be a valid integer, found 3.5"),
        (SCHEDULE + "host: {library: jax, model: x}", "host.library: should be 'timm' or"),
        (SCHEDULE + "host: {library: timm, model: ''}", "host.model: should not be empty"),
        (
            SCHEDULE + "host: {library: timm, model: x, kwargs: {a: {b: 1}}}",
            "host.kwargs.a: should be a finite number, a text, true, false, null or a list of "
            "these, found dict",
        ),
        (
            SCHEDULE + "host: {library: timm, model: x, kwargs: {a: [1, .inf]}}",
            "host.kwargs.a: should be a finite number",
        ),
    ],
)
def test_each_fault_is_reported_at_its_key(text: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(problem)) as caught:
        Recipe.from_text(text)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)
    assert isinstance(caught.value, ValueError)


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(RecipeError, match="There are 5 faults in the recipe:") as caught:
        Recipe.from_text(
            "version: 1\n"
            "stages: [{block: 3, keep_ratio: 0.5}, {block: 6, keep_ratio: 1.5}]\n"
            "schedule: {blocks: [3], keep_ratio: 0.7}\n"
            "train: {epoch: 3, batch_size: 0}\n"
            "loss: {ratio: -1}\n"
        )
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == [
        "give exactly one of `stages` and `schedule`, found both",
        "loss.ratio",
        "stages.1.keep_ratio",
        "train.batch_size",
        "train.epoch",
    ]


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!str 3", "!mine {a: 1}", "! 3"]
)
def test_yaml_tags_are_refused(tag: str) -> None:
    with pytest.raises(RecipeError, match="YAML tags are not allowed in the recipe") as caught:
        Recipe.from_text(f"{SCHEDULE}name: {tag}\n")
    assert caught.value.problems[0].startswith("line 3: tag '")


def test_repeated_keys_are_refused() -> None:
    with pytest.raises(RecipeError, match="A key is given twice in the recipe") as caught:
        Recipe.from_text(
            "version: 1\nstages: [{block: 3, block: 4, keep_ratio: 1}]\nmode: remove\nmode: bypass"
        )
    assert caught.value.problems == (
        "stages.0.block: given again in line 2",
        "mode: given again in line 4",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "No valid YAML in the recipe"),
        ("version: 1\n---\nversion: 1", "change it there: expected a single document"),
        ("a: \x07", "No valid YAML in the recipe"),
        (f"name: {'1' * 5000}", "A number in the recipe cannot be read"),
        ("a: " + "{a: " * 5000 + "}" * 5000, "nest too deeply in the recipe"),
        ("version: &a [*a]", r"Found version \[\[\.\.\.\]\]"),
    ],
)
def test_text_that_is_no_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_text(text)


def test_plain_scalars_mean_what_they_say() -> None:
    recipe = Recipe.from_text(
        SCHEDULE + "name: off\ndescription: 2021-06-03\n"
        "train: {mixed_precision: no, learning_rate: 1e-3, weight_decay: .5}\n"
        "host: {library: timm, model: 010, kwargs: {a: yes, b: true, c: 1_000, d: 1:30, e: ~}}\n"
    )
    assert (recipe.name, recipe.description) == ("off", "2021-06-03")
    assert recipe.train.mixed_precision == "no"
    assert (recipe.train.learning_rate, recipe.train.weight_decay) == (1e-3, 0.5)
    assert recipe.host is not None
    assert recipe.host.model == "010"
    assert recipe.host.kwargs == {"a": "yes", "b": True, "c": "1_000", "d": "1:30", "e": None}


@pytest.mark.parametrize(
    ("num_patches", "keep_ratio", "rounding", "expected"),
    [
        (196, 0.7, "floor", 137),
        (196, 0.49, "floor", 96),
        (196, 0.343, "floor", 67),
        (196, 0.7, "ceil", 138),
        (196, 0.7, "round", 137),
        (5, 0.5, "round", 3),
        (100, 0.29, "floor", 29),  # 100 * 0.29 is 28.999999999999996
        (100, 0.07, "ceil", 7),  # 100 * 0.07 is 7.000000000000001
        (10, 0.01, "floor", 1),
        (1, 0.5, "floor", 1),
        (7, 1.0, "ceil", 7),
    ],
)
def test_num_keep(num_patches: int, keep_ratio: float, rounding: Any, expected: int) -> None:
    assert num_keep(num_patches, keep_ratio, rounding) == expected


def test_num_keep_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="at least 1 patch token, got num_patches=0"):
        num_keep(0, 0.5)
    for ratio in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\], got"):
            num_keep(10, ratio)
