"""What the first pages show: a picture, a comparison of methods, what training prints, a proof.

    python -m benchmarks.front picture   # docs/front.png, half a minute
    python -m benchmarks.front compare   # in docs/choose.md, some minutes
    python -m benchmarks.front start     # in docs/index.md, some minutes
    python -m benchmarks.front proof     # in docs/proof.md, half a minute

All data is embedded in scikit-learn: a photo, and its digits. Nothing is downloaded.
"""

import argparse
import contextlib
import io
import platform
import re
import time
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import tokenprune
from benchmarks.markdown import put
from tokenprune.cli.runs import host_of
from tokenprune.recipe import load_recipe
from tokenprune.report.visualize import DROPPED, LEFT, grid_shape, kept_pixels, paint_groups
from tokenprune.train import build_host, input_settings, load_data, pretrain

DOCS = Path(__file__).parents[1] / "docs"
HOST, METHOD, LEARNED, BATCH = "deit_small_patch16_224", "merge-k0.7", "learned-k0.7", 8
DEMO, EPOCHS = "demo-digits-k0.7", 12
MACS = (0.8, 0.65, 0.5)
LEGEND = """Above: the patches that
stand for a group.

Below: every group in its
mean colour, with borders.

No training: similar tokens
become their mean."""


def machine() -> str:
    """What it ran on."""
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} CPU thread(s), torch {torch.__version__}"


def photo(size: int) -> torch.Tensor:
    """[1, 3, size, size] pixels in [0, 1]: the middle of scikit-learn's flower."""
    from sklearn.datasets import load_sample_image

    whole = Image.fromarray(load_sample_image("flower.jpg"))
    side = min(whole.size)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    square = whole.crop((left, top, left + side, top + side)).resize((size, size), Image.LANCZOS)
    return pil_to_tensor(square).unsqueeze(0) / 255


def picture(target: Path) -> None:
    """Write the picture: the photo, its tokens and groups after each stage, and measured time."""
    torch.manual_seed(0)
    host = timm.create_model(HOST).eval()
    mean, std = (torch.tensor(host.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    pixels = photo(224)
    images = (pixels - mean) / std
    model = tokenprune.wrap(host, METHOD, train=False).eval()
    with torch.no_grad():
        _, trace = model(images, return_trace=True)
    timing = tokenprune.benchmark(model, images, batches=[BATCH], seconds=300).rows[0]
    draw(target, pixels, trace, {"dense": timing.dense, "merged": timing.pruned})
    print(f"{target}: {HOST}, {METHOD}, batch {BATCH}, {machine()}: {timing}")


def draw(target: Path, pixels: torch.Tensor, trace: Any, seconds: dict[str, float]) -> None:
    """Draw it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.1), dpi=120, layout="constrained")
    columns = 1 + len(trace.stages)
    axes = figure.subplot_mosaic(
        [
            [*(f"kept{c}" for c in range(columns)), "time"],
            ["legend", *(f"group{c}" for c in range(1, columns)), "time"],
        ],
        width_ratios=[1] * columns + [0.85],
    )
    size = tuple(pixels.shape[-2:])
    for name, axis in axes.items():
        if name != "time":
            axis.axis("off")
    show(axes["kept0"], pixels, "the image")
    axes["legend"].text(0.02, 0.98, LEGEND, va="top", fontsize=13)
    for number, stage in enumerate(trace.stages, 1):
        grid = grid_shape(stage.decision.shape[1], *size)
        kept = kept_pixels(stage.decision, grid, size).unsqueeze(1)
        dimmed = LEFT * pixels + (1 - LEFT) * torch.tensor(DROPPED).view(3, 1, 1)
        title = f"{int(stage.num_tokens)} of {stage.decision.shape[1]} tokens"
        show(axes[f"kept{number}"], torch.where(kept, pixels, dimmed), title)
        show(axes[f"group{number}"], paint_groups(pixels, stage.groups), "")
    bars = axes["time"]
    milliseconds = {name: 1e3 * value / BATCH for name, value in seconds.items()}
    drawn = bars.bar(list(milliseconds), list(milliseconds.values()), color=["#9aa7b5", "#2f6fb7"])
    bars.bar_label(drawn, fmt="%.0f ms", fontsize=14, padding=3)
    bars.set_title(f"time of an image\n{seconds['dense'] / seconds['merged']:.2f}x", fontsize=14)
    bars.tick_params(axis="x", labelsize=14, length=0)
    bars.set_yticks([])
    bars.margins(y=0.12)
    for side in ("top", "right", "left"):
        bars.spines[side].set_visible(False)
    figure.savefig(target)


def show(axis: Any, pixels: torch.Tensor, title: str) -> None:
    axis.imshow(pixels[0].permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=14)


def compare(page: Path) -> None:
    """Train the demo's small host on digits, and write what `compare` and `calibrate` say of it."""
    started = time.perf_counter()
    recipe = load_recipe(DEMO)
    settings = input_settings(recipe.host, recipe.train.image_size)
    data = load_data(None, **settings, train=recipe.train, seed=0)
    torch.manual_seed(0)
    host = build_host(host_of(recipe), data.num_classes, settings["image_size"])
    pretrain(host, data, EPOCHS, seed=0, progress=False)
    held_out, train = (collected(part) for part in (data.eval, data.train))
    found = tokenprune.compare(host.eval(), *held_out, macs=MACS, progress=False)
    model = tokenprune.wrap(host, METHOD, train=False).eval()
    calibrated = tokenprune.calibrate(model, train[0][:512], macs=0.65, progress=False)
    with torch.no_grad():
        right = (model(held_out[0]).argmax(1) == held_out[1]).float().mean().item()
    seconds, minutes = calibrated.seconds, (time.perf_counter() - started) / 60
    text = (
        f"```text\n{found}\n```\n\n"
        f"`found.advice(0.65)` is\n\n```text\n{found.advice(0.65)}\n```\n\n"
        f"and `calibrate` of `{METHOD}` at 0.65 of the MACs, on 512 training digits without\n"
        f"labels, took {seconds:.0f} s and gives {100 * right:.2f} % on the held-out ones.\n\n"
        f"Made by `python -m benchmarks.front compare` in {minutes:.0f} minutes: "
        f"{machine()},\nnext to other jobs, so that *time* is rough."
    )
    put(page, "compare", text)


def collected(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels."""
    items = [part[number] for number in range(len(part))]
    labels = torch.tensor([int(item["labels"]) for item in items])
    return torch.stack([item["pixel_values"] for item in items]), labels


def start(page: Path) -> None:
    """Run the page's own training, and write what it prints."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)
    code = next(block for block in blocks if "digits" in block)
    printed, started = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    put(
        page,
        "trained",
        f"It prints, after {time.perf_counter() - started:.0f} s "
        f"(`python -m benchmarks.front start`; {machine()}, next to other jobs):\n\n"
        f"```text\n{printed.getvalue()}```",
    )


def proof(page: Path) -> None:
    """Write the certificate of a model of full size."""
    torch.manual_seed(0)
    host = timm.create_model(HOST).eval()
    certificate = tokenprune.verify(tokenprune.wrap(host, LEARNED, verify=False))
    text = f"For `{HOST}`, random weights (`python -m benchmarks.front proof`):\n\n"
    put(page, "certificate", f"{text}```text\n{certificate}\n```")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["picture", "compare", "start", "proof"])
    asked = parser.parse_args().what
    if asked == "picture":
        picture(DOCS / "front.png")
    elif asked == "compare":
        compare(DOCS / "choose.md")
    elif asked == "proof":
        proof(DOCS / "proof.md")
    else:
        start(DOCS / "index.md")


if __name__ == "__main__":
    main()
