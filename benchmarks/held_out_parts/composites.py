"""Classes of transformers that hold an encoder inside: segmentation, detection, depth, towers."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.held_out_parts.host import HeldOut, image

__all__ = ["hosts"]

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
VIT = {**SMALL, "image_size": 64, "patch_size": 8}
WORDS = {**SMALL, "vocab_size": 99, "max_position_embeddings": 40}
GRID = {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 16}
GRID |= {"depths": [2, 2], "num_heads": [2, 2]}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "out_features": ["stage4"],
}
DETR = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5,
    "num_labels": 3, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def hosts() -> Iterator[HeldOut]:
    """The rows."""
    yield from _dense()
    yield from _detection()
    yield from _masked()
    yield from _towers()
    yield from _signals_and_words()


def _row(
    kind: str, config: str, options: Mapping[str, Any], draw: Callable[[], Any], *,
    inner: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None, restore: bool | None = True,
    note: str = "",
) -> HeldOut:  # fmt: skip
    """One class; `inner` are configurations inside of its own, by their argument."""

    def make() -> nn.Module:
        library = import_module("transformers")
        held = {n: getattr(library, c)(**o) for n, (c, o) in (inner or {}).items()}
        built: nn.Module = getattr(library, kind)(getattr(library, config)(**options, **held))
        return built

    named = f"{kind}, {note}" if note else kind
    given = {} if restore is None else {"restore": restore}
    return HeldOut(library="transformers", model=named, make=make, draw=draw, options=given)


def _pixels(size: int = 64, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": image(size)(), **{n: make() for n, make in more.items()}}


def _ids(length: int = 24, **more: Any) -> Callable[[], dict[str, Any]]:
    def draw() -> dict[str, Any]:
        ids = torch.randint(5, 90, (2, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, **more}

    return draw


def _dense() -> Iterator[HeldOut]:
    """Segmentation, depth, backbones."""
    beit = {**VIT, "num_labels": 3, "out_indices": [1, 2, 3, 4]}
    yield _row("BeitForSemanticSegmentation", "BeitConfig", beit, _pixels(), note="with auxiliary")
    plain = {**beit, "use_auxiliary_head": False}
    yield _row("BeitForSemanticSegmentation", "BeitConfig", plain, _pixels())
    yield _row("Data2VecVisionForSemanticSegmentation", "Data2VecVisionConfig", beit, _pixels())
    dpt = {**VIT, **NECK, "backbone_out_indices": [0, 1, 2, 3], "num_labels": 3}
    dpt |= {"reassemble_factors": [4, 2, 1, 0.5], "is_hybrid": False}
    yield _row("DPTForDepthEstimation", "DPTConfig", dpt, _pixels())
    yield _row("DPTForSemanticSegmentation", "DPTConfig", dpt, _pixels())
    yield _row("DPTModel", "DPTConfig", dpt, _pixels())
    seg = {
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1, 1, 2, 2],
        "num_attention_heads": [1, 2, 2, 2],
    }
    yield _row(
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {**seg, "decoder_hidden_size": 16, "num_labels": 3}, _pixels(),
    )  # fmt: skip
    glpn = {**seg, "decoder_hidden_size": 8}
    yield _row("GLPNForDepthEstimation", "GLPNConfig", glpn, _pixels())
    for kind in ("Dinov2", "Dinov2WithRegisters", "Beit", "VitDet", "Swin", "Swinv2", "DINOv3ViT"):
        given = {**(GRID if kind.startswith("Swin") else VIT)}
        if not kind.startswith("Swin"):
            given |= {"out_features": ["stage2", "stage4"]}
        if kind == "VitDet":
            given = {k: v for k, v in given.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
            given |= {"window_size": 4, "window_block_indices": [0, 2], "pretrain_image_size": 64}
        else:
            given |= {"out_features": ["stage1", "stage2"]} if kind.startswith("Swin") else {}
        yield _row(f"{kind}Backbone", f"{kind}Config", given, _pixels())
    inside = {"backbone_config": ("Dinov2Config", {
        **VIT, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "reshape_hidden_states": False, "apply_layernorm": True,
    })}  # fmt: skip
    yield _row(
        "DepthAnythingForDepthEstimation", "DepthAnythingConfig",
        {**NECK, "reassemble_hidden_size": 32, "patch_size": 8, "head_hidden_size": 8},
        _pixels(), inner=inside,
    )  # fmt: skip
    swin = {"backbone_config": ("SwinConfig", {**GRID, "depths": [1] * 4, "num_heads": [2] * 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"]})}  # fmt: skip
    yield _row(
        "UperNetForSemanticSegmentation", "UperNetConfig",
        {"hidden_size": 16, "num_labels": 3, "auxiliary_in_channels": 64, "auxiliary_channels": 8},
        _pixels(), inner=swin,
    )  # fmt: skip
    masks = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 3}
    yield _row(
        "MaskFormerForInstanceSegmentation", "MaskFormerConfig", masks, _pixels(),
        inner={**swin, "decoder_config": ("DetrConfig", DETR)},
    )  # fmt: skip
    yield _row(
        "Mask2FormerForUniversalSegmentation", "Mask2FormerConfig",
        {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_layers": 2,
         "encoder_feedforward_dim": 32, "dim_feedforward": 32, "decoder_layers": 2,
         "num_attention_heads": 2, "num_queries": 5, "num_labels": 3},
        _pixels(), inner=swin,
    )  # fmt: skip
    yield _row(
        "EomtForUniversalSegmentation", "EomtConfig",
        {**VIT, "num_blocks": 2, "num_queries": 5, "num_labels": 3, "num_upscale_blocks": 1},
        _pixels(),
    )  # fmt: skip
    mobile = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]}
    mobile |= {"num_attention_heads": 2, "image_size": 64, "num_labels": 3}
    yield _row("MobileViTForSemanticSegmentation", "MobileViTConfig", mobile, _pixels())
    sam = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_dim": 64}
    sam |= {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1, 3]}
    yield _row("SamVisionModel", "SamVisionConfig", {**sam, "output_channels": 16}, _pixels())
    pvt = {"image_size": 64, "depths": [1, 1, 2, 2], "hidden_sizes": [8, 16, 16, 32]}
    pvt |= {"num_attention_heads": [1, 2, 2, 2]}
    yield _row("PvtForImageClassification", "PvtConfig", pvt, _pixels())


def _detection() -> Iterator[HeldOut]:
    resnet = {"backbone_config": ("ResNetConfig", RESNET)}
    for kind in ("Detr", "ConditionalDetr"):
        yield _row(f"{kind}ForObjectDetection", f"{kind}Config", DETR, _pixels(), inner=resnet)
    yield _row("DetrForSegmentation", "DetrConfig", DETR, _pixels(), inner={
        "backbone_config": ("ResNetConfig", {
            **RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        })})  # fmt: skip
    yield _row("TableTransformerForObjectDetection", "TableTransformerConfig", DETR, _pixels(),
               inner=resnet)  # fmt: skip
    several = {"backbone_config": ("ResNetConfig", {
        **RESNET, "out_features": ["stage2", "stage3", "stage4"],
    })}  # fmt: skip
    deformable = {**DETR, "num_feature_levels": 3, "encoder_n_points": 2, "decoder_n_points": 2}
    yield _row("DeformableDetrForObjectDetection", "DeformableDetrConfig", deformable, _pixels(),
               inner=several)  # fmt: skip
    yolos = {**VIT, "image_size": [64, 64], "num_detection_tokens": 5, "num_labels": 3}
    yield _row("YolosForObjectDetection", "YolosConfig", yolos, _pixels())
    yield _row("YolosModel", "YolosConfig", yolos, _pixels())


def _masked() -> Iterator[HeldOut]:
    def mask(count: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.arange(count).expand(2, -1) % 3 == 0

    for kind in ("ViT", "DeiT", "Beit"):
        yield _row(
            f"{kind}ForMaskedImageModeling", f"{kind}Config",
            {**VIT, "vocab_size": 50, "encoder_stride": 8, "use_mask_token": True},
            _pixels(bool_masked_pos=mask(64)),
        )  # fmt: skip
    yield _row(
        "SwinForMaskedImageModeling",
        "SwinConfig",
        {**GRID, "encoder_stride": 8},
        _pixels(bool_masked_pos=mask(256)),
    )
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
    }
    mae = {**VIT, **decoder, "decoder_intermediate_size": 32}
    yield _row(
        "ViTMAEForPreTraining", "ViTMAEConfig", mae, _pixels(noise=lambda: torch.rand(2, 64))
    )
    yield _row("ViTMAEModel", "ViTMAEConfig", mae, _pixels(noise=lambda: torch.rand(2, 64)))


def _towers() -> Iterator[HeldOut]:
    text = {**SMALL, "vocab_size": 99, "max_position_embeddings": 16}
    for kind in ("CLIP", "Siglip", "AltCLIP", "CLIPSeg"):
        vision = f"{kind}VisionConfig"
        if kind != "AltCLIP":
            yield _row(f"{kind}VisionModel", vision, VIT, _pixels())
            yield _row(
                f"{kind}TextModel", f"{kind}TextConfig", {**text, "eos_token_id": 98}, _ids(16)
            )
        else:
            yield _row(f"{kind}VisionModel", vision, VIT, _pixels())

    for kind in ("CLIP", "Siglip"):
        yield _row(
            f"{kind}Model", f"{kind}Config", {"projection_dim": 16} if kind == "CLIP" else {},
            lambda: {**_ids(16)(), **_pixels()()},
            inner={"text_config": (f"{kind}TextConfig", text),
                   "vision_config": (f"{kind}VisionConfig", VIT)},
        )  # fmt: skip
    yield _row("BlipVisionModel", "BlipVisionConfig", VIT, _pixels())
    yield _row("Blip2VisionModel", "Blip2VisionConfig", VIT, _pixels())
    yield _row("InstructBlipVisionModel", "InstructBlipVisionConfig", VIT, _pixels())
    yield _row("Idefics3VisionTransformer", "Idefics3VisionConfig", VIT, _pixels())
    yield _row("Owlv2VisionModel", "Owlv2VisionConfig", VIT, _pixels())
    yield _row("OwlViTVisionModel", "OwlViTVisionConfig", VIT, _pixels())
    yield _row("XCLIPVisionModel", "XCLIPVisionConfig",
               {**VIT, "num_frames": 2, "mit_hidden_size": 32}, _pixels())  # fmt: skip
    llama = {**WORDS, "num_key_value_heads": 1, "pad_token_id": 0}

    def talk() -> dict[str, Any]:
        ids = torch.full((2, 72), 7)
        ids[:, 4:68] = 90  # a token for each of the image's patches
        return {"input_ids": ids, "use_cache": False, **_pixels()()}

    yield _row(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"image_token_index": 90, "image_seq_length": 64}, talk,
        inner={"vision_config": ("CLIPVisionConfig", VIT),
               "text_config": ("LlamaConfig", {**llama, "max_position_embeddings": 80})},
    )  # fmt: skip
    yield _row("ViltModel", "ViltConfig", {**VIT, **WORDS}, lambda: {**_ids(16)(), **_pixels()()})


def _signals_and_words() -> Iterator[HeldOut]:
    sound = {**SMALL, "conv_dim": (16,) * 3, "conv_stride": (5, 4, 2), "conv_kernel": (10, 4, 2)}
    sound |= {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 4, "vocab_size": 20}
    sound |= {"num_conv_pos_embedding_groups": 2}

    def raw() -> dict[str, Any]:
        return {"input_values": torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))}

    for kind in ("Wav2Vec2", "Hubert"):
        yield _row(f"{kind}Model", f"{kind}Config", sound, raw)
    video = {**VIT, "image_size": 32, "num_frames": 4}
    clip = lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)}  # noqa: E731
    yield _row("VideoMAEForVideoClassification", "VideoMAEConfig", video, clip, restore=None)
    yield _row("TimesformerForVideoClassification", "TimesformerConfig", video, clip, restore=None)
    spectrogram = {**SMALL, "num_mel_bins": 32, "max_length": 64}
    yield _row("ASTForAudioClassification", "ASTConfig", spectrogram,
               lambda: {"input_values": torch.randn(2, 64, 32)}, restore=None)  # fmt: skip
    whisper = {"d_model": 32, "encoder_layers": 4, "encoder_attention_heads": 2, "num_mel_bins": 16}
    whisper |= {"encoder_ffn_dim": 64, "max_source_positions": 40, "vocab_size": 99}
    whisper |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    whisper |= {"num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    yield _row("WhisperForAudioClassification", "WhisperConfig", whisper,
               lambda: {"input_features": torch.randn(2, 16, 80)}, restore=None)  # fmt: skip
    chunked = {**WORDS, "chunk_size_feed_forward": 4}
    yield _row("BertForSequenceClassification", "BertConfig", chunked,
               _ids(), note="chunked feed-forward", restore=None)  # fmt: skip
    yield _row("BertForTokenClassification", "BertConfig", WORDS, _ids())
    yield _row("RobertaForSequenceClassification", "RobertaConfig", WORDS, _ids(), restore=None)
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2}
    yield _row("T5EncoderModel", "T5Config", t5, _ids())
    llama = {**WORDS, "num_key_value_heads": 1, "pad_token_id": 0}
    cached = {"use_cache": False}
    yield _row("LlamaModel", "LlamaConfig", llama, _ids(**cached))
    yield _row("LlamaForSequenceClassification", "LlamaConfig", llama, _ids(**cached), restore=None)
    gpt = {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 40}
    yield _row("GPT2Model", "GPT2Config", gpt, _ids(**cached))
