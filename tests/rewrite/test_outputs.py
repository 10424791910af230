"""Outputs that hold tokens: refused, given back in place, or left short."""

import pytest
import timm
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, ViTConfig, ViTModel

import tokenprune
from tokenprune.errors import UnsupportedHostError
from tokenprune.ops.moving import put_back, put_back_masked

RECIPE = {"version": 1, "schedule": {"blocks": [1, 2, 3], "keep_ratio": 0.7}}
SETS = [[0, 1, 3, 5, 6, 7], [1, 3, 6, 7], [3, 6]]


@pytest.fixture(scope="module")
def host() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=(16, 32),
        patch_size=8,
    )
    return ViTModel(config).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 32, generator=torch.Generator().manual_seed(1))


def kept_sets(batch: int) -> list[Tensor]:
    return [torch.tensor(kept).expand(batch, -1) for kept in SETS]


def test_a_token_output_is_refused_by_name_until_the_caller_says_what_it_wants(
    host: ViTModel,
) -> None:
    with pytest.raises(UnsupportedHostError, match=r"last_hidden_state.*restore=True.*restore=F"):
        tokenprune.wrap(host, RECIPE)


def test_restored_tokens_hold_the_value_they_were_dropped_with(
    host: ViTModel, pixels: Tensor
) -> None:
    model = tokenprune.wrap(host, RECIPE, restore=True, verify=False, train=False).eval()
    # what enters the last stage's block, every token of it
    with model.using("gather", keep_indices=kept_sets(3)), torch.no_grad():
        out = model(pixels, output_hidden_states=True)
        entering = host(pixels, output_hidden_states=True).hidden_states[1]
    assert [state.shape for state in out.hidden_states] == [(3, 9, 32)] * 5
    assert out.last_hidden_state.shape == (3, 9, 32)
    dropped = [1 + patch for patch in range(8) if patch not in SETS[0]]
    assert torch.equal(out.hidden_states[4][:, dropped], entering[:, dropped])
    final = host.layernorm(out.hidden_states[4])
    torch.testing.assert_close(out.last_hidden_state, final)


@pytest.mark.parametrize("restore", [True, False])
def test_paths_agree_on_token_outputs(host: ViTModel, pixels: Tensor, restore: bool) -> None:
    model = tokenprune.wrap(host, RECIPE, restore=restore, verify=False, train=False).eval()
    inputs = {"pixel_values": pixels, "output_hidden_states": True}
    assert tokenprune.verify(model, inputs).mask_vs_gather < 1e-4
    with model.using("mask", keep_indices=kept_sets(3)), torch.no_grad():
        mask = model(**inputs)
    with model.using("gather", keep_indices=kept_sets(3)), torch.no_grad():
        gather = model(**inputs)
    rows = torch.arange(9) if restore else torch.tensor([0, *(1 + p for p in SETS[-1])])
    assert gather.last_hidden_state.shape[1] == len(rows)
    torch.testing.assert_close(mask.last_hidden_state[:, rows], gather.last_hidden_state)


def test_a_norm_by_hand_is_of_each_token() -> None:
    """T5 and Llama end in an RMS norm: a mean over channels. The first token is a prefix."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2}
    host = T5EncoderModel(T5Config(**sizes)).eval()
    given = {"input_ids": torch.arange(32).reshape(2, 16) % 9}
    recipe = {**RECIPE, "mode": "remove"}
    model = tokenprune.wrap(host, recipe, example_inputs=given, restore=True, train=False)
    with model.using("gather", keep_indices=[torch.arange(4).expand(2, -1)] * 3), torch.no_grad():
        states = model(**given, output_hidden_states=True)
        entering = host(**given, output_hidden_states=True).hidden_states[1]
        normed = host.encoder.final_layer_norm(entering)  # what left at block 1, as the others
    assert states.last_hidden_state.shape == (2, 16, 16)
    torch.testing.assert_close(states.last_hidden_state[:, 5:], normed[:, 5:])


def test_putting_back_writes_kept_rows_and_the_prefix_only() -> None:
    full = torch.zeros(2, 6, 1)
    kept = torch.tensor([[0, 3], [1, 2]])
    tokens = torch.tensor([[7.0, 1.0, 2.0], [8.0, 3.0, 4.0]]).unsqueeze(-1)
    restored = put_back(full, tokens, kept, 1).squeeze(-1)
    assert restored.tolist() == [[7, 1, 0, 0, 2, 0], [8, 0, 3, 4, 0, 0]]
    decision = torch.zeros(2, 5).scatter(1, kept, 1.0)
    decision.requires_grad_()
    other = (full + 9).masked_fill(torch.arange(6).reshape(1, 6, 1) == 5, float("inf"))
    masked = put_back_masked(full, other, decision, 1).squeeze(-1)
    assert masked.tolist() == [[9, 9, 0, 0, 9, 0], [9, 0, 9, 9, 0, 0]]
    masked.square().sum().backward()  # what keeping a token is worth: 2 * value * (kept - dropped)
    assert decision.grad is not None
    assert decision.grad.tolist() == [[162, 0, 0, 162, 0], [0, 162, 162, 0, 0]]


@pytest.mark.parametrize("side", [5, 4])  # 4 x 4 places divide the channels: reshape(B, H, W, -1)
def test_maps_are_whole_or_refused(side: int) -> None:
    family, size = timm.models.vision_transformer.VisionTransformer, 8 * side
    shape = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    host = family(**shape, num_classes=3).eval()
    images = torch.randn(2, 3, size, size)
    model = tokenprune.wrap(host, "learned-k0.7", restore=True, verify=False, train=False).eval()
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        assert [tuple(one.shape) for one in maps] == [(2, 32, side, side)] * 4
        assert torch.equal(final, model.forward_features(images))
        assert torch.equal(host.norm(maps[3].permute(0, 2, 3, 1)).flatten(1, 2), final[:, 1:])
        sets = [torch.arange(count).expand(2, -1) for count in (9, 7, 5)]
        with model.using("mask", keep_indices=sets):
            hidden = model.forward_intermediates(images)[1]
        with model.using("gather", keep_indices=sets):
            pruned = model.forward_intermediates(images)[1]
    torch.testing.assert_close(hidden, pruned)
    tokens = tokenprune.wrap(host, "merge-k0.7", restore=False, verify=False, train=False).eval()
    with pytest.raises(UnsupportedHostError, match=r"reshape.*(restore=True|Prune after it)"):
        tokens.forward_intermediates(images)
