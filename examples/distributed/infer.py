"""Classes of all images of a folder, by a pruned model on several processes.

    accelerate launch --multi_gpu --num_processes 2 examples/distributed/infer.py MODEL IMAGES

MODEL is a folder that `tokenprune.save` wrote, such as that of `train.py`. Every process reads and
classifies its share of the files; the first one writes `classes.csv` in their order.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

import tokenprune


class Folder(Dataset):
    """The images of a folder, each with its number."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        with Image.open(self.files[number]) as image:
            return to_tensor(image.convert("RGB")) * 2 - 1, number


parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("images", type=Path)
parser.add_argument("--output", type=Path, default=Path("classes.csv"))
options = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model = tokenprune.load(options.model).eval().to(accelerator.device)
folder = Folder(options.images)
loader = accelerator.prepare(DataLoader(folder, batch_size=32))

started = time.perf_counter()
rows = []
for x, numbers in loader:
    with torch.no_grad():
        logits = model(x)
    # A last batch that cannot be divided is filled up with images from the start; those are left
    # out again here. An image's result does not depend on the others of its batch.
    logits, numbers = accelerator.gather_for_metrics((logits, numbers))
    rows += zip(numbers.tolist(), logits.tolist(), strict=True)
seconds = time.perf_counter() - started

if accelerator.is_main_process:
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        for number, logits in sorted(rows):
            found = max(range(len(logits)), key=logits.__getitem__)
            writer.writerow([folder.files[number].name, found, *(f"{x:.6f}" for x in logits)])
    print(f"{accelerator.num_processes} process(es): {len(rows)} images in {seconds:.1f} s")
accelerator.end_training()
