"""Adapter of transformers' DINOv2 with registers."""

from tokenprune.adapters._transformers import TransformersFamily

__all__ = ["ADAPTER"]

ADAPTER = TransformersFamily(
    name="transformers/dinov2_with_registers",
    home="transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
    block="Dinov2WithRegistersLayer",
    prefix=lambda config: 1 + config.num_register_tokens,
)
