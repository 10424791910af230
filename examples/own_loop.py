"""Learn which tokens to keep in your own PyTorch loop: three lines differ from the dense one."""

import copy

import torch
from _digits import accuracy, batches, digits, trained_vit

import tokenprune

EPOCHS, BATCH = 3, 32

images, labels, held_out, answers = digits()
host = trained_vit(images, labels)
dense = accuracy(host, held_out, answers)

teacher = copy.deepcopy(host)
model = tokenprune.wrap(host, "learned-k0.7").train()  # 1: wrap
loss_of = tokenprune.losses.for_model(model, teacher)  # 2: the loss of the recipe

optimizer = torch.optim.AdamW(
    [
        {"params": model.token_predictors.parameters(), "lr": 1e-3},
        {"params": host.parameters(), "lr": 1e-4},
    ]
)
for epoch in range(EPOCHS):
    kept: dict[int, float] = {}
    for x, y in batches(images, labels, BATCH, epoch):
        output, trace = model(x, return_trace=True)  # 3: ask for the trace
        loss, parts = loss_of(x, output, y, trace)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for number, stage in enumerate(trace.stages):
            share = float(stage.decision.detach().mean())
            kept[number] = share if number not in kept else 0.9 * kept[number] + 0.1 * share
    shown = ", ".join(f"{share:.2f}" for share in kept.values())
    terms = ", ".join(f"{name} {float(part):.3f}" for name, part in parts.items())
    print(f"epoch {epoch}: stages keep {shown} of the tokens (target 0.70, 0.49, 0.34); {terms}")

pruned = accuracy(model, held_out, answers)  # eval removes tokens
counted = tokenprune.profile(model)
print(f"dense   {100 * dense:.2f} %")
print(f"pruned  {100 * pruned:.2f} % at {counted.ratio:.3f} of the MACs")
print(f"patch tokens that enter each block: {counted.tokens_per_block}")

if dense - pruned > 0.03:
    raise SystemExit(f"pruning lost {100 * (dense - pruned):.2f} points, expected 3 at most")
if any(abs(share - 0.7 ** (number + 1)) > 0.1 for number, share in kept.items()):
    raise SystemExit("training does not keep the shares that the recipe asks for")
