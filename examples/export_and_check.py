"""Export a pruned model to ONNX and to pt2, run the files without tokenprune, and compare."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from _digits import digits, trained_vit
from torch import Tensor

import tokenprune

images, labels, held_out, answers = digits()
host = trained_vit(images, labels)
model = tokenprune.wrap(host, "merge-k0.7").eval()
with torch.no_grad():
    wanted = model(held_out)


def quickest(call: Callable[[], object]) -> float:
    """Milliseconds of 64 images, the least of five runs."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)


def compared(name: str, found: Tensor, took: float) -> None:
    """Print how a file did, and stop if it differs from the model."""
    right = float((found.argmax(1) == answers).float().mean())
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"{name:<24} {100 * right:.2f} %, {apart:.1e} from the model, {took:.0f} ms")
    # A file rounds differently; where two tokens have nearly the same score it may merge another.
    agree = float((found.argmax(1) == wanted.argmax(1)).float().mean())
    if agree < 0.99:
        raise SystemExit(f"{name} gives another class for {100 * (1 - agree):.1f} % of the images")


with tempfile.TemporaryDirectory() as folder:
    # `export` writes the file, runs it at two batch sizes beside the model, and keeps it only if
    # both agree. The batch size stays open.
    onnx = tokenprune.export(model, Path(folder) / "pruned.onnx")
    with model.using("dense"):
        dense = tokenprune.export(model, Path(folder) / "dense.onnx")
    pt2 = tokenprune.export(model, Path(folder) / "pruned.pt2")
    for report in (onnx, dense, pt2):
        size = report.num_bytes / 2**20
        apart = f"{report.deviation:.1e} from the model at batch sizes {report.checked}"
        print(f"{report.path.name}: {size:.1f} MiB, {apart}")

    few = held_out[:64]
    for name, report in (("ONNX Runtime, pruned", onnx), ("ONNX Runtime, dense", dense)):
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        asked = report.inputs[0]
        took = quickest(partial(session.run, None, {asked: few.numpy()}))
        if report is onnx:
            (found,) = session.run(None, {asked: held_out.numpy()})
            compared(name, torch.from_numpy(found), took)
        else:
            print(f"{name:<24} {took:.0f} ms")

    program = torch.export.load(pt2.path).module()
    asked = pt2.inputs[0]
    with torch.no_grad():
        took = quickest(partial(program, **{asked: few}))
        compared("torch.export, pruned", program(**{asked: held_out}), took)
