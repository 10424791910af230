"""Padded tokens: never kept in place of real ones, and no part of what a text's output is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

import tokenprune
from tests.zoo.rows import randomize_weights
from tokenprune.losses import ratio_loss
from tokenprune.ops.selection import real_first

LENGTH = 14
RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
SIZES |= {"num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 20, "num_labels": 5}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2}
MODERN = {**SIZES, **SPECIAL, "sep_token_id": 2, "local_attention": 8, "classifier_pooling": "mean"}


def bert() -> Any:
    return BertForSequenceClassification(BertConfig(**SIZES))


def modernbert() -> Any:
    """Its output is a mean over real tokens, and most of its blocks see a window only."""
    return ModernBertForSequenceClassification(ModernBertConfig(**MODERN))


@pytest.fixture(
    scope="module", params=[pytest.param(bert, marks=pytest.mark.slow), pytest.param(modernbert)]
)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    host = request.param().eval()
    randomize_weights(host, 20.0)
    wrapped = tokenprune.wrap(host, RECIPE, verify=False, train=False)
    randomize_weights(wrapped.token_predictors, 1.0)
    return wrapped


def texts(lengths: list[int], total: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Texts of these lengths, class token included, filled up with other tokens to `total`."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 50, (len(lengths), LENGTH), generator=generator)
    real = torch.arange(total) < torch.tensor(lengths).unsqueeze(1)
    fill = torch.randint(3, 50, (len(lengths), total), generator=generator)
    return {
        "input_ids": torch.where(real, words[:, :total], fill),
        "attention_mask": real.long(),
    }


few = settings(max_examples=10)
lengths = st.lists(st.integers(2, LENGTH), min_size=1, max_size=4)


@few
@given(lengths=lengths, path=st.sampled_from(["gather", "mask"]), seed=st.integers(0, 99))
def test_no_padded_token_is_kept_while_a_real_one_is_dropped(
    model: Any, lengths: list[int], path: str, seed: int
) -> None:
    inputs = texts(lengths, seed=seed)
    with torch.no_grad(), model.using(path):
        _, trace = model(**inputs, return_trace=True)
    real = inputs["attention_mask"][:, 1:].bool()
    assert torch.equal(trace.real, real)
    before = torch.ones_like(real)
    for stage in trace.stages:
        kept = stage.decision > 0
        assert not (kept & ~before).any()
        assert len(set(kept.sum(1).tolist())) == 1  # counts are shares of the padded length
        padded_kept = (kept & ~real).any(1)
        real_dropped = (before & ~kept & real).any(1)
        assert not (padded_kept & real_dropped).any()
        before = kept


@few
@given(lengths=lengths, seed=st.integers(0, 99))
def test_both_paths_choose_the_same_tokens(model: Any, lengths: list[int], seed: int) -> None:
    inputs = texts(lengths, seed=seed)
    with torch.no_grad():
        gathered, ours = model(**inputs, return_trace=True)
        with model.using("mask"):
            masked, theirs = model(**inputs, return_trace=True)
    for a, b in zip(ours.stages, theirs.stages, strict=True):
        assert torch.equal(a.decision, b.decision)
    torch.testing.assert_close(gathered.logits, masked.logits, rtol=1e-4, atol=1e-5)


@few
@given(
    length=st.sampled_from([5, LENGTH - 1]),
    path=st.sampled_from(["gather", "mask"]),
    seed=st.integers(0, 99),
)
def test_a_padded_text_says_what_it_says_unpadded(
    model: Any, length: int, path: str, seed: int
) -> None:
    short, padded = texts([length], length, seed), texts([length], LENGTH, seed)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(length - 1, generator=generator)[: max(2, (length - 1) // 2)]
    sets = [first.unsqueeze(0), first[: max(1, len(first) // 2)].unsqueeze(0)]
    with torch.no_grad(), model.using(path, keep_indices=sets):
        alone, ours = model(**short, return_trace=True)
        filled, theirs = model(**padded, return_trace=True)
    torch.testing.assert_close(filled.logits, alone.logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.stages, theirs.stages, strict=True):
        still = a.keep_logits.isfinite().all(-1)
        scored = b.keep_logits[:, : length - 1]
        torch.testing.assert_close(scored[still], a.keep_logits[still], rtol=1e-4, atol=1e-5)


def test_what_fills_up_does_not_matter(model: Any) -> None:
    inputs = texts([5, LENGTH, 9])
    other = texts([5, LENGTH, 9], seed=7)["input_ids"]
    real = inputs["attention_mask"].bool()
    changed = {**inputs, "input_ids": torch.where(real, inputs["input_ids"], other)}
    assert not torch.equal(changed["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**changed).logits, model(**inputs).logits)


def test_training_never_keeps_a_padded_token_and_stays_finite(model: Any) -> None:
    inputs = texts([2, LENGTH, 6])
    real = inputs["attention_mask"][:, 1:]
    model.train()
    try:
        with model.using(generator=torch.Generator().manual_seed(0)):
            output, trace = model(**inputs, return_trace=True)
        for stage in trace.stages:
            assert not (stage.decision * (1 - real)).any()
        loss = output.logits.square().mean()
        loss = loss + ratio_loss([s.decision for s in trace.stages], [0.6, 0.36], real=trace.real)
        loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("token_predictors"):
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
    finally:
        model.zero_grad()
        model.eval()


def test_a_mean_is_over_the_real_tokens_that_are_left() -> None:
    torch.manual_seed(0)
    model = tokenprune.wrap(modernbert().eval(), RECIPE)
    seen: dict[str, Tensor] = {}
    model.model.final_norm.register_forward_hook(lambda m, a, out: seen.update(tokens=out))
    model.head.dense.register_forward_pre_hook(lambda m, args: seen.update(pooled=args[0]))
    sets = [torch.tensor([[0, 2, 5, 9]] * 2), torch.tensor([[2, 9]] * 2)]
    with torch.no_grad(), model.using("gather", keep_indices=sets):
        model(**texts([LENGTH, 6]))
    tokens, pooled = seen["tokens"], seen["pooled"]
    torch.testing.assert_close(pooled[0], tokens[0].mean(0))
    torch.testing.assert_close(pooled[1], tokens[1, :2].mean(0))  # the last one is padding


def test_a_mean_over_no_real_token_is_no_nan(model: Any) -> None:
    inputs = texts([2, LENGTH])
    inputs["attention_mask"][0, 0] = 0  # padded on the left: the first token is always there
    inputs["attention_mask"][0, 1] = 1
    sets = [torch.tensor([[4, 5], [4, 5]]), torch.tensor([[4], [4]])]
    for path in ("gather", "mask"):
        with torch.no_grad(), model.using(path, keep_indices=sets):
            assert model(**inputs).logits.isfinite().all()


def test_without_a_mask_every_token_is_real(model: Any) -> None:
    ids = texts([LENGTH, LENGTH])["input_ids"]
    with torch.no_grad():
        plain, trace = model(input_ids=ids, return_trace=True)
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert trace.real is None
    torch.testing.assert_close(plain.logits, full.logits)


def test_shares_are_of_the_real_tokens() -> None:
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    decision = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert ratio_loss([decision[:2]], [0.5], real=real[:2]) == 0
    assert ratio_loss([decision[:2]], [0.5]) > 0
    assert ratio_loss([decision], [1.0], real=real) == pytest.approx(2 * 0.25 / 3)


def test_real_tokens_come_first_whatever_their_scores_are() -> None:
    scores = torch.tensor([float("nan"), float("-inf"), -3e38, 5.0, 0.0])
    logits = torch.stack([scores, scores], -1).unsqueeze(0)
    ranked = real_first(logits, torch.tensor([[True, True, True, False, True]]))[0, :, 0]
    assert ranked[3] == ranked.min()
    assert (ranked == ranked.min()).sum() == 1
    assert ranked[3] > float("-inf")
