"""Compare methods without training on your own images, and spend a budget where least is lost."""

from _digits import accuracy, digits, trained_vit

import tokenprune

images, labels, held_out, answers = digits()
host = trained_vit(images, labels)

# What each method costs and loses on your images. Labels are optional: without them outputs are
# compared with those of the dense host.
found = tokenprune.compare(host, images[:256], labels[:256], macs=(0.6,), progress=False)
print(found)
print("\nAt 0.6 of the MACs:", found.advice(0.6), sep="\n")

# The stages that the name puts at a quarter, a half and three quarters of the blocks, ...
model = tokenprune.wrap(host, "merge-k0.7").eval()
model.set_budget(macs=0.6)
before = accuracy(model, held_out, answers)

# ... and those at which these images lose least. No labels, no training.
report = tokenprune.calibrate(model, images[:256], macs=0.6, trials=12, progress=False)
after = accuracy(model, held_out, answers)
print(report)
print(f"held-out digits: {100 * before:.2f} % before, {100 * after:.2f} % calibrated")

(was, _), (now, share) = report.before, report.after
if now.divergence > was.divergence or share > 0.62:
    raise SystemExit("calibration lost more than the stages it started from")
if before - after > 0.02:
    raise SystemExit("calibration does worse on held-out digits")
