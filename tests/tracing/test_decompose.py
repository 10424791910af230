"""torch's own attention module, opened up: the same bits as the module itself.

With gradients on, as here, torch runs the module's operations one by one; so does a graph.
"""

import pytest
import torch
from torch import Tensor, nn

from tokenprune.tracing.decompose import multihead_attention


def tokens(length: int, batch: int, width: int) -> Tensor:
    return torch.randn(batch, length, width)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_rounds_as_torch_does(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    for length in (5, 12, 13, 17, 50):
        for width, heads in ((16, 2), (64, 4), (96, 3)):
            module = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first)
            for batch in (1, 2, 3):
                x = tokens(length, batch, width)
                for weights in (True, False):
                    expected, _ = module(x, x, x, need_weights=weights)
                    ours, none = multihead_attention(module, x, x, x, need_weights=weights)
                    assert torch.equal(ours, expected)
                    assert none is None


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kdim", [None, 24])
def test_cross_attention_rounds_as_torch_does(
    batch_first: bool, shared: bool, kdim: int | None
) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, kdim=kdim, vdim=kdim, batch_first=batch_first)
    for length in (5, 13, 17):
        key = tokens(length, 3, kdim or 16)
        value = key if shared else tokens(length, 3, kdim or 16)
        query = tokens(3 if batch_first else length, 3, 16)
        for weights in (True, False):
            expected, _ = module(query, key, value, need_weights=weights)
            ours, none = multihead_attention(module, query, key, value, need_weights=weights)
            assert torch.equal(ours, expected)
            assert none is None


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_hides_the_same(kind: str, weights: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(16, 2, batch_first=True), tokens(5, 3, 16)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mask = hidden if kind == "bool" else torch.randn(5, 5)
    expected, _ = module(x, x, x, need_weights=weights, attn_mask=mask)
    ours, _ = multihead_attention(module, x, x, x, need_weights=weights, attn_mask=mask)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_what_is_not_opened(option: str) -> None:
    module, x = nn.MultiheadAttention(16, 2, **{option: True}), tokens(3, 2, 16)
    with pytest.raises(NotImplementedError, match="bias_k, add_zero_attn, key_padding_mask"):
        multihead_attention(module, x, x, x)
