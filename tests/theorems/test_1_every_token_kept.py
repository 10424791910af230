"""Theorem 1 of docs/theorems.md: with every token kept the model is the host, bit for bit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune
from tests.theorems.case import BATCH, FACTORS, SEED, Case, few, no_fast_path, run, same_bits, sizes


@few
@given(data=st.data(), seed=SEED, batch=BATCH, factor=st.sampled_from(FACTORS))
def test_1_keeping_every_token_is_the_host_bit_for_bit(
    case: Case, data: st.DataObject, seed: int, batch: int, factor: float
) -> None:
    case.start(seed, factor)
    inputs = case.toy.inputs(batch, data.draw(sizes(case)), seed)
    case.model.set_keep_ratio(1.0)
    with torch.no_grad():
        dense = case.host(**inputs)
        assert same_bits(case.model(**inputs), dense)
        with no_fast_path():
            dense = case.host(**inputs)
    for path in ("gather", "dense"):  # with a trace it is the rewritten graph that runs
        output, trace = run(case, inputs, path)
        assert same_bits(output, dense)
        assert type(output) is type(dense)
        assert len(trace.stages) == (case.stages if path == "gather" else 0)


def test_1_unwrap_is_the_host_bit_for_bit(case: Case) -> None:
    case.start(0)
    fresh = case.toy.build()  # never wrapped
    case.model.load_state_dict(fresh.state_dict())
    for size in case.toy.sizes:
        inputs = case.toy.inputs(3, size)
        with torch.no_grad():
            dense = fresh(**inputs)
            assert not same_bits(case.model(**inputs), dense)  # it does prune
            host = tokenprune.unwrap(case.model)
            assert host is case.host
            assert same_bits(host(**inputs), dense)
