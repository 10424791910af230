"""Which hosts, under which recipe; and why a test may end otherwise over a wrapped model."""

from typing import Any

__all__ = ["LEFT_OUT", "TIMM", "TRANSFORMERS", "config_of", "reason", "recipe_of"]

MERGE, BYPASS = "merge-k0.7", "mode: bypass"
TIMM = {
    "test_vit": MERGE,
    "test_vit2": BYPASS,
    "vit_tiny_patch16_224": "",
    "deit_tiny_distilled_patch16_224": MERGE,
    "swin_tiny_patch4_window7_224": "",
}
"""Model -> recipe; empty for the default one, whose predictors are learned."""
TRANSFORMERS = {"ViT": MERGE, "Dinov2": BYPASS}
LEFT_OUT = {
    "timm": [f"test_model_{n}" for n in ("inference", "load_pretrained", "features_pretrained")],
    "transformers": ["test_eager_matches_sdpa_inference*"],
}
"""Patterns of tests that want published weights, or repeat one comparison 25 times."""
TRACERS = (
    "torch.jit and torch.fx freeze one program, and a wrapped model chooses its program by the "
    "call: it refuses them. tokenprune.export writes ONNX and .pt2"
)
MAPS = (
    "attention maps are of the tokens that are left, and cannot be given back in place: "
    "restore=True refuses them by name, restore=False gives the smaller maps"
)
MOCKED = (
    "the test puts a unittest.mock.Mock into a layer, which keeps the tensors of each call: that "
    "is refused by name. And it counts calls of the layer's Python code, of which a program makes "
    "none. Checkpointing itself is served"
)
CUT = (
    "the test cuts blocks away until the blocks of all stages are gone: the forward is refused by "
    "name, predictors get no gradient; where tokens leave, what it reads first are whole grids"
)
BESIDE = (
    "predictors and bypasses lie beside model.safetensors, and from_pretrained of the host's own "
    "class, which the test calls, makes new ones: tokenprune.load(folder) gives the same model"
)
REASONS: dict[tuple[str, ...], dict[str, str]] = {
    tuple(TIMM): {
        **dict.fromkeys(
            [f"test_model_{n}" for n in ("forward_torchscript", "forward_fx", "backward_fx")],
            TRACERS,
        ),
        "test_model_forward_fx_torchscript": TRACERS,
        "test_prune_intermediate_layers_contract": CUT,
    },
    ("swin_tiny_patch4_window7_224",): {
        "test_swin_family_script_after_resize": TRACERS,
        "test_prune_intermediate_layers_params_used": CUT,
    },
    ("ViT",): {
        "test_attention_outputs": MAPS,
        "test_retain_grad_hidden_states_attentions": MAPS,
        **{
            f"test_training_gradient_checkpointing{how}": MOCKED
            for how in ("", "_use_reentrant_false", "_use_reentrant_true")
        },
    },
    ("Dinov2",): {
        "test_bc_torch_dtype": BESIDE,
        "test_can_init_all_missing_weights": BESIDE,
        "test_can_load_from_already_mapped_keys": BESIDE,
        "test_can_use_safetensors": BESIDE,
        "test_load_save_without_tied_weights": BESIDE,
        "test_save_load": BESIDE,
    },
}
"""Hosts -> test -> why it may end otherwise over these."""


def reason(host: str, test: str) -> str | None:
    """Why a test may end otherwise over a host; None if it may not."""
    return next((whys[test] for of, whys in REASONS.items() if host in of and test in whys), None)


SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "image_size": 30, "patch_size": 2,
}  # fmt: skip
KINDS = {
    "ViT": ("ViTForImageClassification",),
    "Dinov2": ("Dinov2Model",),
}


def recipe_of(named: str) -> Any:
    """What `wrap` is given."""
    bypass = {"version": 1, "mode": "bypass", "schedule": {"keep_ratio": 0.7}}
    return bypass if named == BYPASS else named or None


def config_of(host: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The configuration's class, the models' classes, and the sizes of a host of transformers."""
    import transformers

    kinds = tuple(getattr(transformers, name) for name in KINDS[host])
    return getattr(transformers, f"{host}Config"), kinds, dict(SIZES)
