"""An adapter in another distribution, found through the entry-point group `tokenprune.adapters`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

ADAPTER = '''
import torch
from torch import nn
from tokenprune import ArchSpec, ExampleInput

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mixer = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.mixer(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)

class Tower(nn.Module):
    """A host that no shipped adapter tells apart: its blocks lie in three places."""

    def __init__(self):
        super().__init__()
        self.low, self.middle, self.high = Block(), Block(), Block()
        self.first = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, points):
        x = torch.cat([self.first.expand(points.shape[0], -1, -1), points], dim=1)
        return self.high(self.middle(self.low(x)))[:, 0]

class TowerAdapter:
    name = "elsewhere/tower"

    def matches(self, host):
        return isinstance(host, Tower)

    def describe(self, host):
        return ArchSpec(
            adapter=self.name,
            blocks=("low", "middle", "high"),
            num_prefix_tokens=1,
            inputs={"points": ExampleInput((12, 16))},
        )

adapter = TowerAdapter()
'''

USE = """
import torch, tokenprune, elsewhere
print("elsewhere/tower" in tokenprune.list_adapters(), len(tokenprune.list_adapters()))
host = elsewhere.Tower().eval()
model = tokenprune.wrap(host, {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.5}})
certificate = tokenprune.verify(model)
print(certificate.adapter, certificate.num_patches, *certificate.num_keep)
out, trace = model.eval()(torch.randn(2, 12, 16), return_trace=True)
print(*out.shape, *(stage.num_tokens for stage in trace.stages))
"""


def install(site: Path, entry: str) -> None:
    """What an installer leaves in `site` for a distribution with one module and one entry."""
    (site / "elsewhere.py").write_text(ADAPTER)
    facts = site / "tokenprune_elsewhere-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tokenprune-elsewhere\nVersion: 1.0\n"
    )
    (facts / "entry_points.txt").write_text(f"[tokenprune.adapters]\ntower = {entry}\n")


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


def test_an_adapter_of_another_distribution_is_found_and_used(tmp_path: Path) -> None:
    install(tmp_path, "elsewhere:adapter")
    done = use(tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("True ")
    assert rest == ["elsewhere/tower 12 6 3", "2 16 6 3"]


def test_an_entry_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    install(tmp_path, "elsewhere:TowerAdapter.describe")
    done = use(tmp_path)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert "AdapterError" in last
    assert "is no adapter: it needs a `name` and the methods matches(host)" in last
