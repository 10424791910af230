"""Another distribution (`examples/third_party_package`): its adapter and its scorer are found by
their entry points."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples/third_party_package"

USE = """
import torch, tokenprune
from tokenprune_contrast.tower import Tower
print("tokenprune-contrast/tower" in tokenprune.list_adapters(), len(tokenprune.list_adapters()))
recipe = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}, "scorer": "contrast"}
model = tokenprune.wrap(Tower().eval(), recipe)  # the first that asks for a scorer by name
certificate = tokenprune.verify(model)
print(certificate.adapter, certificate.num_patches, *certificate.num_keep)
out, trace = model.eval()(torch.randn(2, 24, 16), return_trace=True)
print(*out.shape, *(stage.num_tokens for stage in trace.stages))
print("contrast-k0.7" in tokenprune.list_recipes())
"""


def install(site: Path, adapter: str) -> None:
    """What an installer leaves in `site`, with another entry in place of the adapter's."""
    shutil.copytree(PACKAGE / "src", site, dirs_exist_ok=True)
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["entry-points"] | {"tokenprune.adapters": {"tower": adapter}}
    facts = site / "tokenprune_contrast-0.1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (facts / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {entry}\n" for name, entry in entries.items())
            for group, entries in groups.items()
        )
    )


def use(site: Path) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(map(str, [site, ROOT]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=site,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def test_adapter_and_scorer_of_another_distribution_are_found_and_used(tmp_path: Path) -> None:
    install(tmp_path, "tokenprune_contrast.tower:ADAPTER")
    done = use(tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("True ")
    assert rest == ["tokenprune-contrast/tower 24 12 6", "2 4 12 6", "True"]


def test_an_entry_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    install(tmp_path, "tokenprune_contrast.tower:TowerAdapter.describe")
    done = use(tmp_path)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "AdapterError" in last
    assert "is no adapter: it needs a `name` and the methods matches(host)" in last
