"""Keep as many tokens of each image as it needs: a threshold instead of a fixed count."""

import torch
from _digits import accuracy, batches, digits, trained_vit

import tokenprune

EPOCHS = 3

images, labels, held_out, answers = digits()
host = trained_vit(images, labels)
dense = accuracy(host, held_out, answers)

# ratio_per_image: false lets hard images keep more than easy ones in training too.
recipe = {
    "version": 1,
    "schedule": {"blocks": [1, 3, 4], "keep_ratio": 0.7},
    "loss": {"ratio_per_image": False},
    "sampling": {"noise": "spread"},
}
model = tokenprune.wrap(host, recipe).train()
loss_of = tokenprune.losses.for_model(model)
optimizer = torch.optim.AdamW(
    [
        {"params": model.token_predictors.parameters(), "lr": 2e-3},
        {"params": host.parameters(), "lr": 1e-4},
    ]
)
for epoch in range(EPOCHS):
    for x, y in batches(images, labels, 32, epoch):
        output, trace = model(x, return_trace=True)
        loss_of(x, output, y, trace)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

fixed = accuracy(model, held_out, answers)
share = tokenprune.profile(model).ratio
print(f"dense            {100 * dense:.2f} %")
print(f"fixed counts     {100 * fixed:.2f} % at {share:.3f} of the MACs for every image")

# The threshold that costs as much on average, found on training images.
model.set_budget(macs=share, images=images[:256])
free = accuracy(model, held_out, answers)
costs_of = tokenprune.ImageMacs(model)
with torch.no_grad():
    _, trace = model(held_out, return_trace=True)
costs = costs_of(trace) / costs_of.dense
least, most = (float(costs.quantile(q)) for q in (0.1, 0.9))
mean = float(costs.mean())
print(f"per image        {100 * free:.2f} % at {mean:.3f} on average, {least:.3f} to {most:.3f}")

kept = trace.stages[-1].decision.sum(1)
for digit in range(10):
    mine = answers == digit
    print(f"digit {digit}: {float(kept[mine].mean()):5.1f} of 64 tokens after the last stage")

# Or any threshold of your own; None goes back to fixed counts.
model.set_threshold(0.5)
at_half = accuracy(model, held_out, answers)
model.set_threshold(None)
print(f"threshold 0.5    {100 * at_half:.2f} %")

if most - least < 0.02:
    raise SystemExit("all images cost the same: the threshold makes no difference between them")
if fixed - free > 0.02 or abs(mean - share) > 0.05:
    raise SystemExit("at the same mean cost the threshold does worse than fixed counts")
