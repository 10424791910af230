"""Rows of the zoo that take texts, sounds and clips: models of transformers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo.rows import BYPASS, CLASSES, THREE, TWO, Row

__all__ = ["SEQUENCES"]

LENGTH, WORDS = 16, 60
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 40}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "cls_token_id": 2}
SPECIAL |= {"eos_token_id": 3, "sep_token_id": 3}
DISENTANGLED = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
DISENTANGLED |= {"pos_att_type": ["p2c", "c2p"], "share_att_key": True}
MODERN = {**SPECIAL, "local_attention": 8, "classifier_pooling": "mean"}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 2, "vocab_size": WORDS}

BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
BLOCKS |= {"num_attention_heads": 2}
SOUND: dict[str, Any] = {**BLOCKS, "conv_dim": (16, 16), "conv_stride": (5, 4)}
SOUND |= {"conv_kernel": (8, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
SOUND |= {"num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16, "vocab_size": 32}
# SpecAugment and LayerDrop draw again in each call and decide by it: no graph can hold that.
SOUND |= {"apply_spec_augment": False, "layerdrop": 0.0}
SAMPLES = 64 * 20
CLIP = {**BLOCKS, "image_size": 16, "patch_size": 8, "num_frames": 4}


def hf(model: str, **options: Any) -> nn.Module:
    """A model of transformers."""
    cls = getattr(transformers, model)
    return cls(cls.config_class(**{"num_labels": CLASSES, **options}))


def texts(batch: int, length: int, argument: str) -> dict[str, Tensor]:
    """Texts of different lengths, filled up."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(4, WORDS, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    for number in range(1, batch):
        mask[number, length - 3 * number :] = 0
    return {argument: ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def _shaped(*shape: int) -> Callable[[int, int, str], dict[str, Tensor]]:
    def draw(batch: int, size: int, argument: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {argument: torch.randn(batch, *shape, generator=generator)}

    return draw


def sounds(batch: int, size: int, argument: str) -> dict[str, Tensor]:
    """Sounds of different lengths, filled up with silence."""
    drawn = _shaped(SAMPLES)(batch, size, argument)
    mask = torch.ones(batch, SAMPLES, dtype=torch.long)
    for number in range(1, batch):
        mask[number, SAMPLES - 300 * number :] = 0
    return {argument: drawn[argument] * mask, "attention_mask": mask}


def _row(name: str, tokens: int, prefix: int, make: Callable[..., nn.Module], **rest: Any) -> Row:
    own = {key: rest.pop(key) for key in list(rest) if key in Row.__dataclass_fields__}
    own = {"family": "generic", "recipe": TWO, "num_blocks": 3, **own}
    if own.get("mode") == "bypass":
        own["recipe"] = BYPASS
    return Row(
        name=name,
        num_prefix=prefix,
        num_tokens=tokens,
        make=partial(make, **rest),
        one_patch_one_token=False,
        **own,
    )


def _text(name: str, model: str, **rest: Any) -> Row:
    rest = {"argument": "input_ids", "sizes": (LENGTH,), "draw": texts, **rest}
    sizes = {} if model.startswith("DistilBert") else TEXT
    classifier = partial(hf, f"{model}ForSequenceClassification")
    return _row(name, LENGTH - 1, 1, classifier, **{**sizes, **rest})


def _sound(name: str, model: str, tokens: int = 63, **rest: Any) -> Row:
    rest = {"argument": "input_values", "draw": sounds, **rest}
    classifier = partial(hf, f"{model}ForSequenceClassification")
    return _row(name, tokens, 0, classifier, **{**SOUND, **rest})


def _clip(name: str, model: str, tokens: int, prefix: int, **rest: Any) -> Row:
    rest = {"argument": "pixel_values", "draw": _shaped(4, 3, 16, 16), **rest}
    return _row(name, tokens, prefix, partial(hf, f"{model}ForVideoClassification"), **rest)


SEQUENCES: tuple[Row, ...] = (
    # texts
    _text("bert", "Bert"),
    _text("roberta", "Roberta"),
    _text("distilbert", "DistilBert", **DISTIL),
    _text("electra", "Electra", embedding_size=16),
    _text("albert", "Albert", embedding_size=16),
    _text("deberta_v2", "DebertaV2", **DISENTANGLED),
    _text("deberta_v2_plain", "DebertaV2"),
    _text(
        "modernbert",
        "ModernBert",
        **MODERN,
        num_hidden_layers=4,
        num_blocks=4,
        recipe=THREE,
        core=True,
    ),
    # sounds
    _sound("wav2vec2", "Wav2Vec2"),
    _sound("wav2vec2_stable", "Wav2Vec2", do_stable_layer_norm=True, feat_extract_norm="layer"),
    _sound("hubert", "Hubert"),
    _sound("unispeech", "UniSpeech"),
    _sound("unispeech_sat", "UniSpeechSat"),
    _sound("wavlm", "WavLM", draw=_shaped(SAMPLES)),  # torch warns of its masks
    _sound("data2vec_audio", "Data2VecAudio"),
    _sound("sew", "SEW", tokens=31, squeeze_factor=2, mode="bypass", family="transformers/sew"),
    _sound("conformer", "Wav2Vec2Conformer", conv_depthwise_kernel_size=3, mode="bypass"),
    _row(
        "wav2vec2_bert",
        64,
        0,
        partial(hf, "Wav2Vec2BertForSequenceClassification"),
        argument="input_features",
        draw=_shaped(64, 16),
        mode="bypass",
        **BLOCKS,
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=3,
        position_embeddings_type="relative_key",
        apply_spec_augment=False,
        layerdrop=0.0,
        vocab_size=32,
    ),
    _row(
        "spectrogram",
        27,
        2,
        partial(hf, "ASTForAudioClassification"),
        argument="input_values",
        draw=_shaped(40, 16),
        **BLOCKS,
        patch_size=8,
        max_length=40,
        num_mel_bins=16,
        frequency_stride=4,
        time_stride=4,
    ),
    _row(
        "whisper",
        20,
        0,
        partial(hf, "WhisperForAudioClassification"),
        argument="input_features",
        draw=_shaped(8, 40),
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        vocab_size=WORDS,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
    ),
    # clips
    _clip(
        "timesformer",
        "Timesformer",
        16,
        1,
        **CLIP,
        mode="bypass",
        family="transformers/timesformer",
    ),
    _clip(
        "timesformer_joint",
        "Timesformer",
        16,
        1,
        **CLIP,
        attention_type="joint_space_time",
        family="transformers/timesformer",
    ),
    _clip("videomae", "VideoMAE", 8, 0, **CLIP),
    _clip("vivit", "Vivit", 8, 1, **CLIP, tubelet_size=[2, 8, 8]),
    _clip(
        "vjepa2",
        "VJEPA2",
        8,
        0,
        argument="pixel_values_videos",
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=8,
        crop_size=16,
        frames_per_clip=4,
        pred_hidden_size=36,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
    ),
    _clip(
        "videoprism",
        "VideoPrism",
        16,
        0,
        argument="pixel_values_videos",
        **{**CLIP, "tubelet_size": [1, 8, 8]},
        num_spatial_layers=3,
        num_temporal_layers=1,
        mode="bypass",
        family="transformers/videoprism",
    ),
)
