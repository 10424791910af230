"""Methods that need no training, by name, on hosts of the zoo: what they read of a host, and that
tokens leave by it."""

import pytest
import torch

import tokenprune
from tests.zoo.hosts import ZOO
from tests.zoo.rows import Row
from tokenprune.recipe.names import named_recipes

NAMES = ["merge-k0.7", "key-norm-k0.7", "random-k0.7", "similarity-k0.7"]
WITH_CLASS_TOKEN = "evit-k0.7"
# The core rows, and one row for each other way to write attention. The rest of the zoo has the
# attention of one of these with other prefix tokens, positions or heads; `test_zoo.py` finds the
# keys of every row. Merging reads keys, and attention, means and tables must know of its sizes;
# what the others read is among that, or what a learned scorer reads.
OTHER_KEYS = {
    *("qk_norm", "parallel_scaling", "parallel_things", "differential", "lvvit", "torchvision_vit"),
    *("eva02", "rope_mixed", "rope_grouped_queries", "relpos", "beit_shared_bias"),
    *("vit_eager", "deit_hf", "beit_hf", "data2vec_vision", "dinov2_hf", "dinov3_vit", "clip_hf"),
    *(
        "bert",
        "distilbert",
        "electra",
        "albert",
        "deberta_v2_plain",
        "perceiver",
        "wav2vec2",
        "wavlm",
    ),
    *("data2vec_audio", "whisper", "spectrogram", "timesformer_joint", "videomae", "vjepa2"),
}
CORE = [row for row in ZOO if row.core and row.mode == "remove"]
OTHER = [row for row in ZOO if row.name in OTHER_KEYS]
CASES = [(row, name) for row in CORE for name in NAMES] + [(row, NAMES[0]) for row in OTHER]
# Each of these has a class token; their attentions form logits, or not, in all ways there are.
CLASS_ROWS = {*("qk_norm", "eva02", "beit_hf", "vit_eager", "deberta_v2_plain", "dinov3_vit")}
CASES += [(row, WITH_CLASS_TOKEN) for row in ZOO if row.name in CLASS_ROWS]


@pytest.mark.parametrize(
    ("row", "name"), [pytest.param(*case, id="-".join((case[0].name, case[1]))) for case in CASES]
)
def test_it_is_certified(row: Row, name: str) -> None:
    """`wrap` proves it on the host."""
    model = tokenprune.wrap(row.build(5.0), name, example_inputs=row.inputs(), train=row.core)
    with torch.no_grad():
        _, trace = model(**row.inputs(3), return_trace=True)
    counts = [stage.num_tokens for stage in trace.stages]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < row.num_patches()


def test_none_is_left_out() -> None:
    assert {row.name for row in OTHER} >= OTHER_KEYS - {"differential"}  # none before timm 1.0.23
    assert set(NAMES) <= set(named_recipes())
