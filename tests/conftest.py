"""Settings that every test shares, and which tests are slow."""

import gc
import os
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("fast", max_examples=5, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

TESTS = Path(__file__).parent
PRODUCT, DOCS = TESTS / "product", TESTS / "docs"
# What repeats on other hosts, or with other words, what a fast test of the same folder finds.
SLOW_FILES = {
    *("test_bad_input.py", "test_errors.py", "analysis/test_blocks.py", "zoo/test_scorers.py"),
    *("cost/test_profile.py", "rewrite/test_outputs.py", "theorems/test_padding.py"),
    *("tune/test_cli_tune.py",),
}
SLOW_TESTS = {
    *("test_one_compiled_graph_serves_every_batch", "test_one_graph"),
    "test_inf_and_nan_of_dropped_tokens_reach_nobody",
    "test_the_adapter_finds_the_facts_and_the_certificate_holds",
    *("test_a_hierarchical_host_is_bypassed_by_name", "test_gradcheck"),
    *("test_training_runs_the_gather_path_and_the_state_has_no_new_key", "test_it_exports"),
    *("test_a_budget_is_replaced_and_the_structure_never_is", "test_nothing_is_changed"),
    *("test_a_host_that_mixes_images_is_refused_whatever_the_example",),
    *("test_names_that_begin_as_ours_are_the_hosts", "test_arguments_that_are_no_tensor"),
    *("test_ratios_of_a_bypass_host_mean_the_same", "test_6_nothing_is_nan_under_autocast"),
    *("test_predictors_answer_to_the_recipe_and_the_seed", "test_a_host_that_also_gives_a_loss"),
    *("test_predictors_have_the_type_of_the_host", "test_example_inputs_in_every_form"),
    *("test_each_stage_sees_the_grid_it_stands_on", "test_the_margin_of_stages_on_two_grids"),
    *("test_a_grid_is_bypassed_where_its_longest_stretch_is",),
    *("test_float64_decides_where_another_dtype_is_too_coarse",),
    *("test_5_sampled_decisions_are_nested", "test_2_in_float64_with_weights_x50"),
    *("test_keeping_every_token_is_the_host_bit_for_bit", "test_another_image_size"),
    *("test_unwrap_gives_the_host_back_bit_for_bit", "test_mask_path_is_gather_path"),
    *("test_pixels_of_dropped_patches_do_not_matter",),
    *("test_an_image_does_not_depend_on_its_neighbours", "test_checkpointing_of_other_kinds"),
}
# Their tests wrap a host each, or several: one in twenty is fast.
SAMPLED = {
    *("test_budget.py", "test_benchmark.py", "test_auto.py", "test_fitted.py", "test_tune.py"),
    *("test_merge.py", "test_fuse.py", "test_windows.py", "test_stretch.py", "test_choice.py"),
    *("test_13_unread.py", "test_9_made.py", "test_9_modules.py", "test_9_classes.py"),
    *("test_9_refused.py", "test_reading.py", "test_remedies.py", "test_launches.py"),
    *("test_generated_hosts.py", "test_constants.py", "test_stand_ins.py", "test_entries.py"),
    *("test_outputs.py", "test_prefix.py", "test_methods.py"),
    *("test_9_live.py", "test_9_places.py", "test_9_holders.py", "test_10_clean.py"),
    *("test_12_telling.py", "test_regions.py", "test_calls.py", "test_hooks.py", "test_watch.py"),
    *("test_model_loss.py", "test_verify.py", "test_wrapping.py", "test_wrapping_modes.py"),
    *("test_bypass.py", "test_untrained.py", "test_jagged.py", "test_model.py", "test_modes.py"),
    *("test_token_probe.py", "test_passes.py", "test_host_graph.py", "test_opaque.py"),
}
# How many hosts are fast, where it is not the first one alone.
CERTIFIED = {"test_the_certificate_holds": 3}


def pytest_configure(config: pytest.Config) -> None:
    """Most tests prune by predictors as `wrap` makes them, so their first eval call warns. The
    warning is tested in `runtime/test_fitted.py`."""
    config.addinivalue_line("filterwarnings", "ignore:untrained predictors")


def pytest_collection_finish() -> None:
    """Leave libraries and tests out of every garbage collection, and of each trace's search for
    generators of random numbers."""
    gc.collect()
    gc.freeze()


_ended = count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """And what tests have imported; what only another test let go is collected now and then."""
    if next(_ended) % 250 == 0:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import `product` and `docs` where slow tests are left out."""
    left_out = collection_path in (PRODUCT, DOCS) and config.option.markexpr == "not slow"
    return True if left_out else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow: `product`, what is named above, tests over toys and rows that are not core, and
    most cases of one test."""
    cases = Counter[str]()
    for item in items:
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        rare = any(getattr(param, "core", True) is False for param in params)
        file, name = item.path.relative_to(TESTS).as_posix(), item.name.partition("[")[0]
        if rare or file in SLOW_FILES or name in SLOW_TESTS or PRODUCT in item.path.parents:
            item.add_marker(pytest.mark.slow)
            continue
        sampled = item.path.name in SAMPLED
        case = cases[file if sampled else name]
        cases[file if sampled else name] += 1
        if case % 20 if sampled else case >= CERTIFIED.get(name, 1):
            item.add_marker(pytest.mark.slow)
