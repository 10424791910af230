"""Merge similar tokens of a trained model, without training it again."""

import timm
import torch
from _digits import accuracy, digits, trained_vit

import tokenprune

images, labels, held_out, answers = digits()
host = trained_vit(images, labels)
dense = accuracy(host, held_out, answers)

# Three stages; each lets the most similar tokens become their mean, and keeps 0.7 of them.
model = tokenprune.wrap(host, "merge-k0.7").eval()
print(tokenprune.profile(model))

# Or say what a forward may cost, and let the counts follow from it.
share = model.set_budget(macs=0.7)
merged = accuracy(model, held_out, answers)
print(f"dense   {100 * dense:.2f} % of {len(answers)} digits, 1.000 of the MACs")
print(f"merged  {100 * merged:.2f} % of {len(answers)} digits, {share:.3f} of the MACs")

# What became of each patch: `groups` says which ones share a token, `sizes` how many they are.
with torch.no_grad():
    _, trace = model(held_out[:4], return_trace=True)
for number, stage in enumerate(trace.stages):
    largest = int(stage.sizes.max())
    print(f"stage {number}: {stage.num_tokens} tokens, the largest stands for {largest} patches")

# What merging gains in time here, on a host of a usual size. Time does not depend on the weights.
deit = timm.create_model("deit_tiny_patch16_224")
large = tokenprune.wrap(deit, "merge-k0.7", verify=False, train=False).eval()
print(tokenprune.benchmark(large, batches=(1, 16), progress=False))

if dense - merged > 0.03:
    raise SystemExit(f"merging lost {100 * (dense - merged):.2f} points, expected 3 at most")
if share > 0.72:
    raise SystemExit(f"asked for 0.7 of the MACs, got {share:.3f}")
