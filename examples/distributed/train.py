"""The loop of `own_loop.py` on several processes, with accelerate.

    accelerate launch --multi_gpu --num_processes 2 examples/distributed/train.py           # DDP
    accelerate launch --multi_gpu --num_processes 2 examples/distributed/train.py --shard   # FSDP2

Without a GPU the same commands start processes on the CPU, which talk over gloo.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import tokenprune

sys.path.append(str(Path(__file__).parents[1]))
from _digits import accuracy, digits, trained_vit

parser = argparse.ArgumentParser()
parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
parser.add_argument("--steps", type=int, default=44)
parser.add_argument("--output", type=Path, default=Path("runs/examples/distributed"))
options = parser.parse_args()

# The 32 images of a step are split over the processes, so that each step is that of one process.
accelerator = Accelerator(
    cpu=not torch.cuda.is_available(),
    dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
)
set_seed(0)
images, labels, held_out, answers = digits()
host = trained_vit(images, labels)
host = host.to(accelerator.device)
model = tokenprune.wrap(host, "learned-k0.7").train()
loss_of = tokenprune.losses.for_model(model)  # of the wrapped model, before anything wraps it

if options.shard:
    # Parameters of each block lie in pieces on all processes, and are whole while it runs.
    for block in model.blocks:
        fully_shard(block)
    running = fully_shard(model)
else:
    running = accelerator.prepare(model)
optimizer = torch.optim.AdamW(
    [
        {"params": model.token_predictors.parameters(), "lr": 1e-3},
        {"params": model.blocks.parameters(), "lr": 1e-4},
    ]
)
loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
optimizer, loader = accelerator.prepare(optimizer, loader)

steps = []
while len(steps) < options.steps:
    for x, y in loader:
        output, trace = running(x, return_trace=True)
        loss, _ = loss_of(x, output, y, trace)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        kept = torch.stack([stage.decision.detach().mean() for stage in trace.stages])
        # the mean over the processes, of the loss and of the shares that the stages kept
        means = accelerator.reduce(torch.cat([loss.detach()[None], kept]), "mean")
        steps.append(means.tolist())
        if len(steps) == options.steps:
            break
        if len(steps) % 10 == 1:
            shown = ", ".join(f"{share:.2f}" for share in steps[-1][1:])
            accelerator.print(f"step {len(steps)}: loss {steps[-1][0]:.4f}, stages keep {shown}")

# Whole weights on every process, then one that writes them.
weights = get_model_state_dict(
    model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
)
if accelerator.is_main_process:
    whole = tokenprune.wrap(trained_vit(images, labels), "learned-k0.7", verify=False, train=False)
    whole.load_state_dict(weights)
    right = accuracy(whole, held_out, answers)
    tokenprune.save(whole, options.output)
    facts = {"processes": accelerator.num_processes, "steps": steps, "accuracy": right}
    (options.output / "steps.json").write_text(json.dumps(facts))
    print(f"{accelerator.num_processes} process(es): {100 * right:.2f} %, in {options.output}")
accelerator.end_training()
