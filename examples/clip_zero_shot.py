"""Classify by texts, as CLIP does, with merged image tokens; the text tower stays as it is."""

import time

import torch
import torch.nn.functional as F
from _digits import WORDS, batches, digits
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import tokenprune

# No download here: a small CLIP from a configuration, trained on digits and their names. With
# published weights all that follows is the same: CLIPModel.from_pretrained("openai/clip-...").
LETTERS = "abcdefghijklmnopqrstuvwxyz "
LENGTH = 24
FIRST, LAST = len(LETTERS) + 1, len(LETTERS) + 2
CONFIG = CLIPConfig(
    text_config={
        "vocab_size": LAST + 1, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": LENGTH,
        "bos_token_id": FIRST, "eos_token_id": LAST, "pad_token_id": 0,
    },
    vision_config={
        "image_size": 32, "patch_size": 4, "hidden_size": 48, "intermediate_size": 192,
        "num_hidden_layers": 6, "num_attention_heads": 3,
    },
    projection_dim=48,
)  # fmt: skip


def tokens(text: str) -> list[int]:
    """A letter each, between two marks."""
    ids = [FIRST, *(LETTERS.index(letter) + 1 for letter in text), LAST]
    return ids + [0] * (LENGTH - len(ids))


@torch.no_grad()
def zero_shot(clip: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest text of each image, and the image's embedding."""
    texts = F.normalize(clip.get_text_features(input_ids=PROMPTS).pooler_output, dim=-1)
    seen = F.normalize(clip.get_image_features(pixel_values=images).pooler_output, dim=-1)
    return (seen @ texts.T).argmax(1), seen


PROMPTS = torch.tensor([tokens(f"the digit {word}") for word in WORDS])

images, labels, held_out, answers = digits()
torch.manual_seed(0)
clip = CLIPModel(CONFIG)
for table in (
    clip.vision_model.embeddings.position_embedding,
    clip.text_model.embeddings.position_embedding,
    clip.text_model.embeddings.token_embedding,
):  # 0.02 needs dozens of epochs on so few images
    torch.nn.init.normal_(table.weight, std=0.5)
optimizer = torch.optim.AdamW(clip.parameters(), 2e-3, weight_decay=0.05)
cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=6 * 44)
for epoch in range(6):
    for x, y in batches(images, labels, 32, epoch):
        logits = clip(input_ids=PROMPTS, pixel_values=x).logits_per_image
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        cycle.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {float(loss.detach()):.3f}")
clip.eval()

started = time.perf_counter()
dense, dense_embedding = zero_shot(clip, held_out)
dense_seconds = time.perf_counter() - started

# The whole model is not wrapped: its output depends on the other images of the batch. The vision
# tower is, in place, and every call that runs it is pruned.
clip.vision_model = tokenprune.wrap(clip.vision_model, "merge-k0.7", restore=False).eval()
share = clip.vision_model.set_budget(macs=0.7)
zero_shot(clip, held_out[:2])
started = time.perf_counter()
merged, embedding = zero_shot(clip, held_out)
seconds = time.perf_counter() - started

right, right_merged = (float((found == answers).float().mean()) for found in (dense, merged))
cosine = float((dense_embedding * embedding).sum(1).mean())
same = float((dense == merged).float().mean())
print(f"dense   {100 * right:.2f} % of {len(answers)} digits, {dense_seconds:.2f} s")
print(f"merged  {100 * right_merged:.2f} %, {seconds:.2f} s, {share:.3f} of the tower's MACs")
print(f"the same text for {100 * same:.2f} %, cosine of dense and merged embeddings {cosine:.4f}")

clip.vision_model = tokenprune.unwrap(clip.vision_model)  # dense again
if not torch.equal(zero_shot(clip, held_out)[1], dense_embedding):
    raise SystemExit("unwrap must give back the dense tower")
if same < 0.95 or right < 0.8:
    raise SystemExit("merging changed the texts that are found")
