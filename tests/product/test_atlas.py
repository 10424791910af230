"""The atlas tool: rows are kept, failures are reasons, limits hold, smaller builds are sound."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

from benchmarks.atlas import Store, estimate, main, scope
from benchmarks.atlas_parts.measure import measure
from benchmarks.atlas_parts.page import as_json, as_page, read_json
from benchmarks.atlas_parts.pool import Limits, run
from benchmarks.atlas_parts.row import Row
from benchmarks.atlas_parts.timm_hosts import MODULES, TimmHost, shrink, timm_hosts
from benchmarks.atlas_parts.transformers_hosts import frames, text, transformers_hosts, wave
from benchmarks.atlas_parts.weights import enliven, parameters_in_millions, weightless

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def vit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", **TINY)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))


@dataclass(frozen=True)
class Tiny:
    """A host of the atlas that takes no time; writes its name down whenever it is built."""

    model: str
    make: Callable[[], nn.Module]
    diary: Path | None = None
    module: str = "tiny"
    library: str = "timm"
    restore: bool = True

    def build(self) -> nn.Module:
        if self.diary is not None:
            with self.diary.open("a") as file:
                file.write(f"{self.model}\n")
        return self.make()

    def build_smaller(self) -> tuple[nn.Module, str]:
        return self.make(), "nothing"

    def inputs(self, host: nn.Module) -> dict[str, Any] | None:
        return None


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """A certified and a refused row."""
    return {row.model: row for row in map(measure, (Tiny("vit", vit), Tiny("conv", convolutions)))}


def test_a_host_that_wraps_is_certified_at_full_size(rows: dict[str, Row]) -> None:
    row = rows["vit"]
    assert row.certified, row.reason
    assert (row.adapter, row.mode) == ("timm/vision_transformer", "remove")
    assert (row.tokens, row.prefix, row.blocks, row.stages) == (16, 1, 4, [1, 2, 3])
    assert row.certified_at == "full"
    assert row.certificate is not None
    assert 0 < row.certificate["max_error"] < 1e-4
    assert row.certificate["keep_one_exact"] is True
    assert row.gmacs_dense is not None
    assert row.gmacs_pruned is not None
    assert row.gmacs_pruned < row.gmacs_dense
    assert row.parameters == round(parameters_in_millions(vit()), 2)


def test_a_host_without_blocks_is_refused_with_the_reason(rows: dict[str, Row]) -> None:
    row = rows["conv"]
    assert not row.certified
    assert "no stack of transformer blocks" in row.reason
    assert row.certificate is None
    assert row.certified_at is None


def test_whatever_a_host_raises_is_its_reason() -> None:
    def broken() -> nn.Module:
        raise ZeroDivisionError("no luck")

    row = measure(Tiny("broken", broken))
    assert row.reason.startswith("unexpected ZeroDivisionError at ")
    assert row.reason.endswith("no luck")


def test_a_large_host_is_counted_at_full_size_and_proven_on_the_smaller_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.atlas_parts.measure.SMALL_PARAMETERS", 0.001)
    row = measure(Tiny("vit", vit))
    assert row.certified, row.reason
    assert row.certified_at == "reduced: nothing"
    assert row.tokens == 16
    assert row.gmacs_dense is not None


def test_a_smaller_build_that_another_adapter_describes_proves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.atlas_parts.measure.SMALL_PARAMETERS", 0.001)

    class Other(Tiny):
        def build_smaller(self) -> tuple[nn.Module, str]:
            return timm.create_model("eva02_tiny_patch14_224", **TINY), "the class"

    row = measure(Other("vit", vit))
    assert row.reason.startswith("not proven: the smaller build is described by 'timm/eva'")
    assert row.certificate is None


def test_rows_survive_json_and_reasons_lose_this_machine(rows: dict[str, Row]) -> None:
    for row in rows.values():
        assert Row.from_json(row.to_json()) == row
    assert json.loads(rows["vit"].to_json())["class"] == "VisionTransformer"
    row = rows["conv"]
    row.refuse("at /home/me/lib/python3.11/site-packages/timm/models/pit.py:1\n in  forward")
    assert row.reason == "at timm/models/pit.py:1 in forward"


def command(folder: Path, *more: str) -> list[str]:
    return ["--work", str(folder / "work"), "--docs", str(folder), *more]


def test_a_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diary = tmp_path / "diary"
    hosts = [Tiny("vit", vit, diary), Tiny("conv", convolutions, diary)]
    main(command(tmp_path, "--only", "v*"), hosts)
    said = capsys.readouterr().out
    assert "1 rows to measure, 0 there" in said
    assert "1 of 2 rows are missing: docs stay as they are" in said
    assert not (tmp_path / "atlas.json").exists()
    with (tmp_path / "work" / "rows.jsonl").open("a") as file:
        file.write('{"library": "timm", "mod')  # killed while it wrote
    before = Counter(diary.read_text().split())
    main(command(tmp_path), hosts)
    after = Counter(diary.read_text().split())
    assert after["vit"] == before["vit"] > 0
    assert after["conv"] > 0 == before["conv"]
    held = read_json((tmp_path / "atlas.json").read_text())
    assert [(row.model, row.status) for row in held] == [("vit", "certified"), ("conv", "refused")]
    main(command(tmp_path, "--again-refused"), hosts)
    again = Counter(diary.read_text().split())
    assert again["vit"] == after["vit"]
    assert again["conv"] > after["conv"]
    assert len(Store(tmp_path / "work").rows) == 2


def test_the_page_has_totals_families_and_reasons(rows: dict[str, Row], tmp_path: Path) -> None:
    store = Store(tmp_path / "work")
    for row in rows.values():
        store.add(row)
    hosts = [Tiny("vit", vit), Tiny("conv", convolutions), Tiny("later", vit)]
    (tmp_path / "held_out.json").write_text(as_json(list(rows.values())))
    main(command(tmp_path, "--render-only"), hosts)
    page = (tmp_path / "atlas.md").read_text()
    assert "| timm | 2 (1 not measured yet) | **1** | 1 | 50.0 % |" in page
    assert "| `tiny` | 1 of 2 | timm/vision\\_transformer" not in page
    assert "| `tiny` | 1 of 2 | timm/vision_transformer | remove | 16 | 1 | 4 |" in page
    assert "| full 1 |" in page
    assert "| `tiny` | `conv` |" in page
    of_others = page.partition("## Held out: timm")[2]
    assert "1 of 2 hosts that nothing was written for are certified; tokens leave 1" in of_others
    assert "\n| `conv` | " in of_others
    assert str(tmp_path) not in page
    assert as_page([], Counter(timm=3), {}).count("## ") == 0


def test_the_estimate_goes_by_what_was_measured() -> None:
    assert "about 8 min (8.0 s a row, 1 at a time)" in estimate(60, {}, 1)
    row = Row("timm", "vit", "tiny", seconds=4.0)
    assert "about 2 min (4.0 s a row, 2 at a time)" in estimate(60, {row.key: row}, 2)


def spin(host: Any) -> Row:
    end = time.process_time() + 60
    while time.process_time() < end:
        pass
    raise AssertionError("nobody ended this")


def die(host: Any) -> Row:
    os._exit(3)


@pytest.mark.parametrize(
    ("work", "limits", "reason"),
    [
        (spin, Limits(seconds=0.2), "time limit: not done in 0.2 s"),
        (spin, Limits(gigabytes=0.001), "memory limit: more than 0.001 GB"),
        (die, Limits(), "its process died with exit code 3"),
    ],
)
def test_a_process_that_does_not_answer_is_a_refused_row(
    work: Callable[[Any], Row], limits: Limits, reason: str
) -> None:
    (row,) = run([Tiny("vit", vit)], 1, limits, work=work)
    assert (row.model, row.status, row.reason) == ("vit", "refused", reason)


def test_weightless_hosts_hold_no_memory_and_have_their_shapes() -> None:
    host = weightless(lambda: timm.create_model("vit_giant_patch14_dinov2"))
    assert parameters_in_millions(host) == pytest.approx(1136.5, abs=0.1)
    stored = sum(p.untyped_storage().nbytes() for p in host.parameters())
    assert stored < 1e5
    assert {p.device.type for p in host.parameters()} == {"cpu"}


def test_no_parameter_stays_where_it_hides_errors() -> None:
    host = enliven(timm.create_model("deit3_small_patch16_224", **TINY))
    for name, parameter in host.named_parameters():
        if parameter.numel() > 1:
            assert parameter.std() > 0.001, name


def test_the_scope_is_the_whole_of_both_libraries() -> None:
    found = Counter(host.module for host in timm_hosts())
    assert len(MODULES) == 42 == len(found)
    for module in MODULES:
        assert found[module] == len(timm.list_models(module=module)) > 0
    keys = [(host.library, host.model) for host in scope()]
    assert len(keys) == len(set(keys)) == found.total() + len(transformers_hosts())
    assert len(transformers_hosts()) > 60
    assert all(host.module for host in transformers_hosts())


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_smaller_build(module: str) -> None:
    host = TimmHost(timm.list_models(module=module)[-1], module)
    changes: list[str] = []

    def smaller() -> nn.Module:
        built, words = host.build_smaller()
        changes.append(words)
        return built

    assert parameters_in_millions(weightless(smaller)) < 70
    assert " -> " in changes[0] or parameters_in_millions(weightless(host.build)) < 30


def test_a_smaller_build_keeps_what_must_divide() -> None:
    def make(depths: Any = (2, 2, 6, 2), num_heads: Any = (3, 6, 12, 24), embed_dim: int = 96):
        raise NotImplementedError

    arguments, words, size = shrink(make, {"window_size": 7}, 224, narrow=True, longest=4)
    assert arguments == {
        "window_size": 7,
        "depths": (2, 2, 4, 2),
        "num_heads": (1, 2, 4, 8),
        "embed_dim": 32,
    }
    assert words[0] == "depths (2,2,6,2) -> (2,2,4,2)"
    assert size is None
    given = {"depth": 12, "num_heads": 12, "embed_dim": 768, "patch_size": 16, "img_size": 1024}
    given["global_attn_indexes"] = (2, 5, 8, 11)
    arguments, _, size = shrink(TimmHost, given, 224, narrow=False, longest=4)
    assert (arguments["depth"], arguments["embed_dim"]) == (4, 768)
    assert arguments["global_attn_indexes"] == (2,)
    assert arguments["img_size"] == size == 288


def test_drawn_inputs_are_padded_where_a_mask_is_taken() -> None:
    masked = [host for host in transformers_hosts() if host.draw in (text, wave, frames)]
    assert len(masked) > 15
    for host in masked:
        inputs = host.inputs(weightless(lambda host=host: host.build_smaller()[0]))
        assert inputs is not None
        assert {value.shape[0] for value in inputs.values()} == {2}
        assert inputs["attention_mask"].sum(dim=1).diff() < 0
