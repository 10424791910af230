"""Run `train.py` and `infer.py` on one process and on two, and compare what they find."""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
from _digits import digits, trained_vit

HERE = Path(__file__).parent
STEPS = 24
TWO = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
FIXED = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def run(script: str, *arguments: str | Path, processes: int = 1) -> None:
    """Start a script of this folder; its output goes to ours."""
    start = ["-m", *TWO, *FIXED] if processes > 1 else []
    command = [sys.executable, *start, str(HERE / script), *map(str, arguments)]
    # On a machine with GPUs this example stays on the CPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment)


images, labels, held_out, answers = digits()
trained_vit(images, labels)  # once, before two processes would train it at the same time
with tempfile.TemporaryDirectory() as name:
    work = Path(name)
    kinds = {"one process": (1,), "DDP": (2,), "FSDP2": (2, "--shard")}
    found = {}
    for kind, (processes, *flags) in kinds.items():
        folder = work / kind.replace(" ", "-")
        run("train.py", "--steps", str(STEPS), "--output", folder, *flags, processes=processes)
        found[kind] = json.loads((folder / "steps.json").read_text())
    # Noise is spread over the tokens, not drawn, so that the processes agree with one process but
    # for rounding. A rounding difference may turn a decision that was undecided.
    alone = torch.tensor(found["one process"]["steps"])
    for kind in ("DDP", "FSDP2"):
        apart = (torch.tensor(found[kind]["steps"]) - alone).abs().max(0).values
        shares = apart[1:].max()
        print(f"{kind}: losses of {STEPS} steps {apart[0]:.1e} apart, kept shares {shares:.1e}")
        if found[kind]["processes"] != 2 or apart.max() > 2e-3:
            raise SystemExit(f"training by {kind} differs from one process")

    pictures = work / "pictures"
    pictures.mkdir()
    for number, image in enumerate(held_out[:101]):  # no multiple of two
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(pictures / f"{number:04}.png")
    tables = []
    for processes in (1, 2):
        target = work / f"{processes}.csv"
        run("infer.py", work / "DDP", pictures, "--output", target, processes=processes)
        with target.open(newline="") as file:
            tables.append(list(csv.reader(file)))
one, two = tables
right = sum(int(row[1]) == int(answer) for row, answer in zip(two, answers[:101], strict=True))
apart = max(
    abs(float(x) - float(y))
    for mine, other in zip(one, two, strict=True)
    for x, y in zip(mine[2:], other[2:], strict=True)
)
print(f"inference: {right} of {len(two)} right, logits {apart:.1e} apart")
if [row[:2] for row in one] != [row[:2] for row in two] or apart > 1e-4:
    raise SystemExit("two processes classify other than one")
