"""Prune a segmentation model: tokens leave inside, and every pixel still gets its class."""

import torch
from _digits import digits, train, trained_vit
from torch import Tensor, nn

import tokenprune

BACKGROUND = 10


class Segmenter(nn.Module):
    """A ViT of timm, and a linear layer that gives each patch the classes of its 4 x 4 pixels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(64, 11 * 16)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 11, 32, 32] of images [B, 3, 32, 32]."""
        tokens = self.head(self.encoder.forward_features(images)[:, 1:])
        return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (8, 8)), 4)


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Intersection over union, the mean of the eleven classes."""
    found = model.eval()(images).argmax(1)
    both = torch.bincount((11 * classes + found).flatten(), minlength=121).view(11, 11)
    return float((both.diag() / (both.sum(0) + both.sum(1) - both.diag())).mean())


images, labels, held_out, answers = digits()
# The class of a pixel is the digit where there is ink, and background elsewhere.
pixels, truth = (
    torch.where(x[:, 0] > 0, y[:, None, None], BACKGROUND)
    for x, y in ((images, labels), (held_out, answers))
)
host = Segmenter(trained_vit(images, labels))
train(host, images, pixels, epochs=3, learning_rate=1e-3)
dense = mean_iou(host, held_out, truth)
print(f"dense            mean IoU {dense:.3f}")

# The encoder is wrapped in place. restore=True: what it returns holds every token. A merged one
# has the value of its group, a removed one the value it had when it left.
encoder, results = host.encoder, {}
for name in ("merge-k0.7", "token-norm-k0.7"):
    host.encoder = tokenprune.wrap(encoder, name, restore=True, train=False).eval()
    share = host.encoder.set_budget(macs=0.75)
    results[name] = mean_iou(host, held_out, truth)
    print(f"{name:<16} mean IoU {results[name]:.3f} at {share:.3f} of the encoder's MACs")

with torch.no_grad():
    tokens = host.encoder.forward_features(held_out[:1])
print(f"the encoder returns {tuple(tokens.shape)}: a class token and 64 patches")

if tokens.shape != (1, 65, 64):
    raise SystemExit("tokens are missing in what the encoder returned")
if dense - results["merge-k0.7"] > 0.1:
    raise SystemExit("merging lost more than 0.1 of the mean IoU")
