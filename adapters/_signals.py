"""What audio and video models of transformers take, read from their configuration."""

from typing import Any

from torch import nn

from tokenprune.adapters._facts import image_example
from tokenprune.hosts.spec import ExampleInput

__all__ = ["image_side", "signal_inputs"]

FRAMES = 64


def signal_inputs(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Input of a host that takes clips, spectrograms or raw sound; {} if it takes none of these."""
    main = str(getattr(host, "main_input_name", ""))
    shape = _shape(config, main)
    return {main: ExampleInput(shape)} if shape else {}


def image_side(config: Any) -> Any:
    """Side of the images that a model sees, in pixels; None if it sees none."""
    return getattr(config, "image_size", None) or getattr(config, "crop_size", None)


def _shape(config: Any, main: str) -> tuple[int, ...] | None:
    def known(name: str) -> Any:
        return getattr(config, name, None)

    if main.startswith("pixel_values"):
        frames = known("num_frames") or known("frames_per_clip")
        image = image_example(known("num_channels") or known("in_chans") or 3, image_side(config))
        return (frames, *image.shape) if frames and image else None
    if main == "input_values" and known("num_mel_bins"):  # a spectrogram [time, bins]
        return (config.max_length, config.num_mel_bins)
    if main == "input_values" and known("conv_stride"):  # raw sound, before strided convolutions
        return (FRAMES * config.inputs_to_logits_ratio,)
    if main == "input_features" and known("feature_projection_input_dim"):  # [time, features]
        return (FRAMES, config.feature_projection_input_dim)
    if main == "input_features" and known("num_mel_bins"):  # [bins, time], halved once
        return (config.num_mel_bins, 2 * config.max_source_positions)
    return None
