"""Theorem 4 of docs/theorems.md: an image does not depend on the others of its batch."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.theorems.case import SEED, Case, difference, few, nested_sets, run, tensors


def of_image(result: tuple[Any, Any], image: int) -> list[Tensor]:
    """The rows of one image: outputs, then what was decided about its tokens."""
    output, trace = result
    decided = [t for stage in trace.stages for t in (stage.keep_logits, stage.decision)]
    return [t[image : image + 1] for t in (*tensors(output), trace.patch_tokens, *decided)]


@few
@given(data=st.data(), seed=SEED)
def test_4_an_image_does_not_depend_on_the_others(
    case: Case, data: st.DataObject, seed: int
) -> None:
    case.start(seed)
    garbage = data.draw(case.garbage)
    inputs = case.toy.inputs(3, seed=seed)
    sets = data.draw(nested_sets(case.stages, case.toy.sizes[0], 3))
    image = data.draw(st.integers(0, 2))
    only = slice(image, image + 1)
    alone = {name: value[only] for name, value in inputs.items()}
    others = torch.arange(3).view(3, 1, 1, 1) != image
    spoilt = {**inputs, "x": inputs["x"].masked_fill(others, garbage)}
    for path in ("gather", "mask"):
        together = of_image(run(case, inputs, path, sets), image)
        beside = of_image(run(case, spoilt, path, sets), image)
        assert difference(beside, together) < case.bound
        if case.toy.images_alone:
            single = of_image(run(case, alone, path, [kept[only] for kept in sets]), 0)
            assert difference(single, together) < case.bound


@few
@given(data=st.data(), seed=SEED)
def test_4_which_tokens_stay_does_not_depend_on_the_other_images(
    case: Case, data: st.DataObject, seed: int
) -> None:
    case.start(seed)
    inputs = case.toy.inputs(3, seed=seed)
    image = data.draw(st.integers(0, 2))
    others = torch.arange(3).view(3, 1, 1, 1) != image
    spoilt = {**inputs, "x": inputs["x"].masked_fill(others, data.draw(case.garbage))}
    for path in ("gather", "mask"):
        pairs = zip(*(run(case, x, path)[1].stages for x in (inputs, spoilt)), strict=True)
        assert all(torch.equal(a.decision[image], b.decision[image]) for a, b in pairs)
