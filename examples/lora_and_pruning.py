"""LoRA on a pruned model with PEFT: adapters and token predictors learn, the host is frozen."""

import tempfile
from pathlib import Path

import torch
from _digits import accuracy, batches, digits, trained_vit
from peft import LoraConfig, PeftModel, get_peft_model

import tokenprune

EPOCHS = 3

images, labels, held_out, answers = digits()
host = trained_vit(images, labels)

# A task that the host does not know: is the digit odd? The head keeps its ten outputs.
odd, answers = labels % 2, answers % 2
model = tokenprune.wrap(host, "learned-k0.7")

config = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["token_predictors", "head"])
tuned = get_peft_model(model, config)
trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
print(f"{trainable} of {sum(p.numel() for p in tuned.parameters())} parameters are trained")

loss_of = tokenprune.losses.for_model(model)  # of the wrapped model, not of PEFT's
optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 2e-3)
tuned.train()
for epoch in range(EPOCHS):
    for x, y in batches(images, odd, 32, epoch):
        output, trace = tuned(x, return_trace=True)
        loss, parts = loss_of(x, output, y, trace)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = ", ".join(f"{float(stage.num_tokens):.1f}" for stage in trace.stages)
    print(f"epoch {epoch}: loss {float(loss.detach()):.3f}, stages keep {kept} of 64 tokens")

after = accuracy(tuned, held_out, answers)
print(f"odd or even: {100 * after:.2f} % of {len(answers)} held-out digits, pruned")
print(f"{tokenprune.profile(model).ratio:.3f} of the MACs")

with tempfile.TemporaryDirectory() as folder:
    tuned.save_pretrained(folder)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"saved {size / 1024:.0f} KiB: adapters, predictors, head")
    fresh = tokenprune.wrap(trained_vit(images, labels), "learned-k0.7")
    again = PeftModel.from_pretrained(fresh, folder).eval()
with torch.no_grad():
    wanted = tuned(held_out)
    same = torch.equal(again(held_out), wanted)
    merged = tuned.merge_and_unload()  # the wrapped model, with the adapters in its weights
    difference = float((merged(held_out) - wanted).abs().max())
print(f"loaded: {'the same' if same else 'NOT the same'}; merged: {difference:.1e} apart")

if not same or merged is not model or difference > 1e-4:
    raise SystemExit("saving or merging the adapters changed the outputs")
if after < 0.9:
    raise SystemExit(f"LoRA reached {100 * after:.2f} %, expected 90 at least")
