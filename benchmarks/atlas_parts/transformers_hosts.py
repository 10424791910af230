"""transformers' part of the atlas: one row per class, at its default size and at a small one.

The full size is the class's default configuration, mostly a base model. The small one changes depth
and width and keeps every other option.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["TransformersHost", "transformers_hosts"]

Options = Mapping[str, Any]
Draw = Callable[[Any], dict[str, Tensor]]

BATCH = 2
WORDS, PADDING = 128, 40  # length of a text, and padding of the second text
SAMPLES = 16_000  # one second of sound

DEPTH: Options = {"num_hidden_layers": 4}
NARROW: Options = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
VIT: Options = {**DEPTH, **NARROW}
PVT: Options = {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 32, 80, 128]}


@dataclass(frozen=True)
class TransformersHost:
    """One class of transformers.

    Attributes:
        model: The class.
        small: Options of the smaller build; options of a part are in a mapping of its name.
        full: Options of the full build that differ from the default configuration.
        draw: Makes a batch of two from the configuration; None if the adapter knows the inputs.
    """

    model: str
    small: Options
    full: Options = field(default_factory=dict)
    draw: Draw | None = None
    library: str = "transformers"
    restore: bool = True

    @property
    def module(self) -> str:
        """Name of the modeling file that defines the class, without `modeling_`."""
        home: str = getattr(transformers, self.model).__module__
        return home.rpartition(".")[2].removeprefix("modeling_")

    def build(self) -> nn.Module:
        """At full size, without pretrained weights."""
        return self._make(self.full)

    def build_smaller(self) -> tuple[nn.Module, str]:
        """With the options of `small`, and these as text."""
        smaller = _merged(self.full, self.small)
        return self._make(smaller), _in_words(self.small)

    def inputs(self, host: nn.Module) -> dict[str, Any] | None:
        """A batch of two, drawn from the host's configuration."""
        return self.draw(host.config) if self.draw else None

    def _make(self, options: Options) -> nn.Module:
        kind = getattr(transformers, self.model)
        host: nn.Module = kind(kind.config_class(**options))
        return host


def _merged(full: Options, small: Options) -> dict[str, Any]:
    merged = dict(full)
    for name, value in small.items():
        inner = merged.get(name, {})
        merged[name] = _merged(inner, value) if isinstance(value, Mapping) else value
    return merged


def _in_words(options: Options, prefix: str = "") -> str:
    parts = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            parts.append(_in_words(value, f"{prefix}{name}."))
        else:
            parts.append(f"{prefix}{name} {str(value).replace(' ', '')}")
    return ", ".join(parts)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())


def image(config: Any) -> dict[str, Tensor]:
    """224 x 224 pixels, for configurations that hold no image size."""
    return {"pixel_values": _randn(BATCH, 3, 224, 224)}


def perceived(config: Any) -> dict[str, Tensor]:
    """What a Perceiver takes."""
    return {"inputs": _randn(BATCH, 3, 224, 224)}


def colours(config: Any) -> dict[str, Tensor]:
    """ImageGPT's clustered pixels."""
    shape = (BATCH, config.n_positions)
    return {"input_ids": torch.randint(0, config.vocab_size - 1, shape, generator=_generator())}


def flexible_patches(config: Any) -> dict[str, Tensor]:
    """SigLIP 2's patches; the second image is smaller than the first, and padded."""
    vision = config.vision_config
    side = int(vision.num_patches**0.5)
    mask = torch.ones(BATCH, side * side, dtype=torch.long)
    mask[1, side * (side - 2) :] = 0
    return {
        "pixel_values": _randn(BATCH, side * side, 3 * vision.patch_size**2),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[side, side], [side - 2, side]]),
    }


def video(config: Any) -> dict[str, Tensor]:
    """Frames of the configuration's size and number."""
    size = config.image_size
    return {"pixel_values": _randn(BATCH, config.num_frames, 3, size, size)}


def clip(config: Any) -> dict[str, Tensor]:
    """V-JEPA 2's name for a video."""
    size = config.crop_size
    return {"pixel_values_videos": _randn(BATCH, config.frames_per_clip, 3, size, size)}


def spectrogram(config: Any) -> dict[str, Tensor]:
    """AST's mel spectrogram."""
    return {"input_values": _randn(BATCH, config.max_length, config.num_mel_bins)}


def wave(config: Any) -> dict[str, Tensor]:
    """One second of sound, and a second one that is shorter."""
    mask = torch.ones(BATCH, SAMPLES, dtype=torch.long)
    mask[1, SAMPLES * 3 // 4 :] = 0
    return {"input_values": _randn(BATCH, SAMPLES), "attention_mask": mask}


def frames(config: Any) -> dict[str, Tensor]:
    """Wav2Vec2-BERT's frames of features, the second sound shorter."""
    mask = torch.ones(BATCH, WORDS, dtype=torch.long)
    mask[1, -PADDING:] = 0
    features = _randn(BATCH, WORDS, config.feature_projection_input_dim)
    return {"input_features": features, "attention_mask": mask}


def log_mel(config: Any) -> dict[str, Tensor]:
    """Whisper's thirty seconds."""
    return {"input_features": _randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions)}


def text(config: Any) -> dict[str, Tensor]:
    """Two texts, the second one padded."""
    ids = torch.randint(5, 100, (BATCH, WORDS), generator=_generator())
    mask = torch.ones(BATCH, WORDS, dtype=torch.long)
    mask[1, -PADDING:] = 0
    ids[1, -PADDING:] = config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask}


def _row(model: str, small: Options = VIT, draw: Draw | None = None, **full: Any) -> Any:
    return TransformersHost(model, small, full, draw)


def _towers(**rest: Any) -> Options:
    return {"vision_config": dict(VIT), "text_config": dict(VIT), **rest}


HOSTS = (
    # images: plain hosts
    _row("ViTForImageClassification"),
    _row("DeiTForImageClassification"),
    _row("DeiTForImageClassificationWithTeacher"),
    _row("BeitForImageClassification", use_relative_position_bias=True),
    _row("Data2VecVisionForImageClassification", use_relative_position_bias=True),
    _row("Dinov2ForImageClassification", {**DEPTH, "hidden_size": 128, "num_attention_heads": 2}),
    _row(
        "Dinov2WithRegistersForImageClassification",
        {**DEPTH, "hidden_size": 128, "num_attention_heads": 2},
    ),
    _row("DINOv3ViTModel"),
    _row("ViTMSNForImageClassification"),
    _row("IJepaForImageClassification"),
    _row("CLIPForImageClassification", _towers()),
    _row("MetaClip2ForImageClassification", _towers()),
    _row("SiglipForImageClassification", _towers()),
    _row("Siglip2ForImageClassification", _towers(), flexible_patches),
    _row(
        "TimmWrapperForImageClassification",
        {"model_args": {"depth": 4, "embed_dim": 128, "num_heads": 2}},
        architecture="vit_base_patch16_224",
    ),
    _row(
        "ImageGPTForImageClassification",
        {"n_layer": 4, "n_embd": 64, "n_head": 2},
        colours,
        use_cache=False,
    ),
    # images: hierarchies and others
    _row("SwinForImageClassification", {"embed_dim": 32, "num_heads": [1, 2, 4, 8]}),
    _row("Swinv2ForImageClassification", {"embed_dim": 32, "num_heads": [1, 2, 4, 8]}),
    _row("DonutSwinForImageClassification", {"embed_dim": 32, "num_heads": [1, 2, 4, 8]}),
    _row("HieraForImageClassification", {"depths": [2, 2, 4, 2], "embed_dim": 32}),
    _row("LevitForImageClassification", {"depths": [2, 2, 2]}),
    _row("LevitForImageClassificationWithTeacher", {"depths": [2, 2, 2]}),
    _row("PvtForImageClassification", PVT),
    _row("PvtV2ForImageClassification", PVT),
    _row("SegformerForImageClassification", PVT, image),
    _row("CvtForImageClassification", {"depth": [1, 2, 4]}, image),
    _row("MobileViTForImageClassification", {"hidden_sizes": [48, 64, 80]}),
    _row("MobileViTV2ForImageClassification", {"width_multiplier": 0.5}),
    _row("SwiftFormerForImageClassification", {"depths": [2, 2, 4, 2]}, image),
    _row("PoolFormerForImageClassification", {"depths": [1, 1, 2, 1]}, image),
    _row("DinatForImageClassification", {"depths": [1, 2, 4, 1]}, image),
    _row("FocalNetForImageClassification", {"depths": [2, 2, 4, 2], "embed_dim": 32}),
    *(
        _row(
            f"PerceiverForImageClassification{kind}",
            {"num_self_attends_per_block": 4, "num_latents": 32, "d_latents": 64},
            perceived,
            image_size=224,
            num_cross_attention_heads=1,
        )
        for kind in ("Learned", "Fourier", "ConvProcessing")
    ),
    # images: towers, alone and in dual models
    _row("CLIPModel", _towers()),
    _row("CLIPVisionModel"),
    _row("CLIPVisionModelWithProjection"),
    _row("MetaClip2Model", _towers()),
    _row("SiglipModel", _towers()),
    _row("SiglipVisionModel"),
    # videos
    _row("TimesformerForVideoClassification", VIT, video),
    _row("VideoMAEForVideoClassification", {**VIT, "num_frames": 4}, video),
    _row("VivitForVideoClassification", {**VIT, "num_frames": 4}, video),
    _row(
        "VJEPA2ForVideoClassification",
        {
            **DEPTH,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "frames_per_clip": 4,
            "crop_size": 128,
            "pred_num_hidden_layers": 1,
            "num_pooler_layers": 1,
        },
        clip,
    ),
    # sounds
    _row("ASTForAudioClassification", {**VIT, "max_length": 256}, spectrogram),
    *(
        _row(model, VIT, wave)
        for model in (
            "Wav2Vec2ForSequenceClassification",
            "HubertForSequenceClassification",
            "WavLMForSequenceClassification",
            "Data2VecAudioForSequenceClassification",
            "SEWForSequenceClassification",
            "SEWDForSequenceClassification",
            "UniSpeechForSequenceClassification",
            "UniSpeechSatForSequenceClassification",
            "Wav2Vec2ConformerForSequenceClassification",
        )
    ),
    _row("Wav2Vec2BertForSequenceClassification", VIT, frames),
    _row(
        "WhisperForAudioClassification",
        {"d_model": 128, "encoder_attention_heads": 2, "max_source_positions": 300},
        log_mel,
    ),
    # texts
    _row("BertForSequenceClassification", VIT, text),
    _row("RobertaForSequenceClassification", VIT, text),
    _row(
        "DistilBertForSequenceClassification",
        {"n_layers": 4, "dim": 128, "n_heads": 2, "hidden_dim": 256},
        text,
    ),
    _row("ElectraForSequenceClassification", {**VIT, "embedding_size": 64}, text),
    _row("AlbertForSequenceClassification", {**VIT, "embedding_size": 64}, text),
    _row(
        "DebertaV2ForSequenceClassification",
        VIT,
        text,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
    ),
    _row("ModernBertForSequenceClassification", VIT, text),
)


def transformers_hosts() -> list[TransformersHost]:
    """All classes of the scope."""
    return list(HOSTS)
