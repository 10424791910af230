"""Wrapping needs no memory beyond the host's own weights plus 20 %."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")
BOUND = 0.2

# VmHWM, not ru_maxrss: the latter starts at what the parent process held when it forked.
MEASURE = """
import copy, json, timm, torch, tokenprune

RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}

def build(width, depth):
    vit = timm.models.vision_transformer.VisionTransformer
    shape = {"img_size": 64, "patch_size": 16, "num_heads": 4, "num_classes": 10}
    return vit(embed_dim=width, depth=depth, **shape).eval()

def memory(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

def run(host):
    with torch.no_grad():
        host(torch.zeros(2, 3, 64, 64))

small = build(16, 3)  # so that code is loaded before anything is measured
run(small)
tokenprune.wrap(small, RECIPE)

host = build(1024, 3)
run(host)
weights = sum(p.nbytes for p in host.parameters())
held, peak = memory("VmRSS"), memory("VmHWM")
tokenprune.wrap(host, RECIPE)
wrapped = memory("VmHWM")
copy.deepcopy(host)
copied = memory("VmHWM")
print(json.dumps([weights, held, peak - held, wrapped - held, copied - held]))
"""


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc/self/status, which Linux has")
def test_peak_memory_of_wrap() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    weights, held, built, wrapped, copied = json.loads(done.stdout.splitlines()[-1])
    assert held > weights > 140 * 2**20
    assert built < BOUND * weights  # what building took hides nothing
    assert wrapped < BOUND * weights
    assert copied > BOUND * weights  # a copy of the host would have been seen
