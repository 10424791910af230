"""torch's own attention module, opened up: the same bits as the module itself.

With gradients on, as here, torch runs the module's operations one by one; so does a graph.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenprune.errors import TokenPruneWarning
from tokenprune.tracing.decompose import (
    decoder,
    decomposed,
    encoder,
    encoder_layer,
    is_leaf,
    multihead_attention,
)


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


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("option", ["", "add_bias_kv", "add_zero_attn", "kdim"])
def test_more_keys_and_masks_of_every_shape(option: str, batch_first: bool, weights: bool) -> None:
    torch.manual_seed(0)
    more: dict[str, Any] = {option: 16 if option == "kdim" else True} if option else {}
    module, x = nn.MultiheadAttention(16, 2, batch_first=batch_first, **more), tokens(5, 3, 16)
    given = x if batch_first else x.transpose(0, 1)
    padded = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]).bool()
    for masks in (
        {"key_padding_mask": padded},
        {"key_padding_mask": torch.zeros(3, 5).masked_fill(padded, float("-inf"))},
        {"attn_mask": torch.randn(3 * 2, 5, 5)},
        {"key_padding_mask": padded, "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    ):
        expected, _ = module(given, given, given, need_weights=weights, **masks)
        ours, _ = multihead_attention(module, given, given, given, need_weights=weights, **masks)
        assert torch.equal(ours, expected)
    one = given.select(0 if batch_first else 1, 0)
    expected, _ = module(one, one, one, need_weights=weights)
    assert torch.equal(
        multihead_attention(module, one, one, one, need_weights=weights)[0], expected
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_encoders_and_decoders_round_as_torch_does(mask: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    how: dict[str, Any] = {"dim_feedforward": 24, "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(16, 2, **how)
    module = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    x, masks = tokens(5, 3, 16), dict[str, Any]()
    if mask == "causal":
        masks = {"mask": nn.Transformer.generate_square_subsequent_mask(5)}
    elif mask == "padding":
        masks = {"src_key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)}
    expected = module.eval()(x, **masks)
    torch.testing.assert_close(encoder(module, x, **masks), expected)
    other = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **how), 2).eval()
    names = {"mask": "tgt_mask", "src_key_padding_mask": "tgt_key_padding_mask"}
    masks = {names[name]: value for name, value in masks.items()}
    torch.testing.assert_close(decoder(other, x, x + 1, **masks), other(x, x + 1, **masks))


class OwnAttention(nn.TransformerEncoderLayer):
    """Adds the masks that it gets to its scores."""

    def _sa_block(
        self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False
    ) -> Tensor:
        scores = x @ x.transpose(1, 2)
        scores = scores if attn_mask is None else scores + attn_mask
        scores = scores if key_padding_mask is None else scores + key_padding_mask.unsqueeze(1)
        return scores.softmax(-1) @ x


class OwnLayer(OwnAttention):
    def forward(
        self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, **_: Any
    ) -> Tensor:
        return src + self._sa_block(src, src_mask, src_key_padding_mask)


class ByName(nn.Module):
    """A layer of a decoder whose masks stand in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tgt: Tensor, memory: Tensor, *, memory_mask: Any, **_: Any) -> Tensor:
        return tgt + memory_mask @ memory


def test_layers_get_the_masks_that_torch_hands_them() -> None:
    x, hidden = tokens(5, 3, 16), torch.tensor([[False] * 4 + [True]] * 3)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for masks in ({"src_key_padding_mask": hidden}, {"src_mask": later}):
        layer = OwnAttention(16, 2, 24, batch_first=True).eval()
        torch.testing.assert_close(encoder_layer(layer, x, **masks), layer(x, **masks))
        stack = nn.TransformerEncoder(
            OwnLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
        )
        masks = {"mask" if name == "src_mask" else name: mask for name, mask in masks.items()}
        torch.testing.assert_close(encoder(stack, x, **masks), stack(x, **masks))
    other = nn.TransformerDecoder(ByName(), 2)  # type: ignore[arg-type]
    given: dict[str, Any] = {"memory_mask": torch.randn(5, 5)}
    torch.testing.assert_close(decoder(other, x, x + 1, **given), other(x, x + 1, **given))


def test_zeros_in_padded_rows_are_told_of() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    x, hidden = tokens(5, 3, 16), torch.tensor([[False] * 4 + [True]] * 3)
    module = nn.TransformerEncoder(layer, 2)
    encoder(module, x, src_key_padding_mask=hidden)  # in training there are none
    module.eval()
    encoder(module, x)
    with pytest.warns(TokenPruneWarning, match="padded rows: .* enable_nested_tensor=False"):
        ours = encoder(module, x, src_key_padding_mask=hidden)
    module.enable_nested_tensor = module.use_nested_tensor = False
    torch.testing.assert_close(ours, module(x, src_key_padding_mask=hidden))


def test_what_is_opened() -> None:
    class Own(nn.TransformerEncoderLayer):
        def forward(self, src: Tensor, *_: Any, **__: Any) -> Tensor:
            return src

    given: Any = (16, 2, 24)
    for module in (nn.TransformerEncoderLayer(*given), nn.TransformerDecoderLayer(*given)):
        assert not is_leaf(module)
    assert decomposed(nn.TransformerEncoderLayer(*given)) is encoder_layer
    assert decomposed(Own(*given)) is None
