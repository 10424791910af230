"""timm's part of the atlas: every registry name of the modules with attention, and a smaller build.

timm's entrypoints end in `build_model_with_cfg(cls, ..., **arguments)`. A smaller build of the same
class changes a few of these arguments there and keeps all others.
"""

import dataclasses
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import timm
from timm.models import model_entrypoint
from torch import nn

__all__ = ["MODULES", "TimmHost", "shrink", "timm_hosts"]

MODULES = (
    *("vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos"),
    *("vision_transformer_hybrid", "vitamin", "naflexvit", "cait", "xcit", "volo", "convit"),
    *("crossvit", "tnt", "pit", "levit", "visformer", "deepseek_vit", "qwen3_vit", "gemma4_vit"),
    *("vision_transformer_sam", "hieradet_sam2", "hiera", "swin_transformer"),
    *("swin_transformer_v2", "swin_transformer_v2_cr", "twins", "pvt_v2", "mvitv2", "davit"),
    *("gcvit", "nest", "coat", "maxxvit", "mobilevit", "edgenext", "efficientformer"),
    *("efficientformer_v2", "tiny_vit", "nextvit", "focalnet", "metaformer"),
)

# Names of the arguments, over all classes of these modules.
DEPTH = ("depth", "depths", "layers", "stages", "serial_depths", "parallel_depth", "num_vit")
HEADS = ("num_heads", "num_heads_outer", "num_kv_heads")
WIDTH = ("embed_dim", "embed_dims", "dims", "inner_dim", "intermediate_size")
BLOCK_NUMBERS = ("global_attn_indexes", "global_att_blocks")
PER_BLOCK = ("num_kv_heads", "mlp_ratios")

HEAD_WIDTH = 32  # where a class has a width of heads instead of a number
# Image sides that fit every patch size, every stem, and whole windows.
PIXELS, STEM_PIXELS, WINDOW_PIXELS = 224, 160, 256
FEW_PATCHES, MANY_PATCHES = 18, 24  # patches per side of the smaller image; above this it is made
OTHERS = 2  # blocks of every other stage than the longest
# Narrower or not, and blocks of the longest stage; the next one if the class refuses these.
ATTEMPTS = ((True, 4), (False, 4), (False, 5))


@dataclasses.dataclass(frozen=True)
class TimmHost:
    """One name of timm's registry."""

    model: str
    module: str
    library: str = "timm"
    restore: bool = True

    def build(self) -> nn.Module:
        """The model of that name, without pretrained weights."""
        return timm.create_model(self.model, pretrained=False)

    def build_smaller(self) -> tuple[nn.Module, str]:
        """The same class with fewer and narrower blocks, and the changes as text.

        A class whose width depends on other arguments (a stem that is built outside) refuses other
        widths; then only the depth is changed.
        """
        for narrow, longest in ATTEMPTS[:-1]:
            try:
                return self._build_smaller(narrow, longest)
            except (AssertionError, IndexError, RuntimeError, ValueError):
                continue
        return self._build_smaller(*ATTEMPTS[-1])

    def _build_smaller(self, narrow: bool, longest: int) -> tuple[nn.Module, str]:
        library = sys.modules[model_entrypoint(self.model).__module__]
        build, changed = library.build_model_with_cfg, []
        side = int(timm.get_pretrained_cfg(self.model).input_size[-1])

        def smaller(cls: Any, *args: Any, **arguments: Any) -> nn.Module:
            given, words, size = shrink(cls, arguments, side, narrow, longest)
            changed.extend(words)
            host: nn.Module = build(cls, *args, **given)
            if size is not None:  # adapters read the size of the input here
                configured: Any = host.pretrained_cfg
                configured["input_size"] = (3, size, size)
            return host

        with mock.patch.object(library, "build_model_with_cfg", smaller):
            return self.build(), ", ".join(changed)

    def inputs(self, host: nn.Module) -> None:
        """None: the adapter knows the inputs."""


def timm_hosts() -> list[TimmHost]:
    """All names of `MODULES`, module by module."""
    return [
        TimmHost(model, module) for module in MODULES for model in timm.list_models(module=module)
    ]


def shrink(
    cls: Any, arguments: Mapping[str, Any], side: int, narrow: bool, longest: int
) -> tuple[dict[str, Any], list[str], int | None]:
    """Arguments of a smaller host, the changes as text, and the image side if it changed.

    Args:
        cls: Class of the host; its defaults fill missing arguments.
        arguments: Of the entrypoint, fields of a dataclass (`cfg`, `model_cfg`) included.
        side: Of the registry's image, in pixels.
        narrow: Change widths too.
        longest: Blocks of the longest stage.
    """
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    given = dict(arguments)
    held: dict[str, Any] = {n: v for n, v in given.items() if dataclasses.is_dataclass(v)}
    inside = {
        name: {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        for name, value in held.items()
    }
    flat = {**defaults, **given, **{k: v for part in inside.values() for k, v in part.items()}}
    changes = _shallower(flat, longest)
    if narrow:
        changes |= _narrower({**flat, **changes})
    side = max(_leaves(given.get("img_size") or side))
    size = _smaller_image(flat, side)
    words = _in_words(flat, changes) + ([f"image {side} -> {size}"] if size else [])
    if size is not None and "img_size" in flat:
        changes["img_size"] = size
    for name, part in inside.items():
        own = {key: value for key, value in changes.items() if key in part}
        given[name] = dataclasses.replace(held[name], **own)
        changes = {key: value for key, value in changes.items() if key not in own}
    return given | changes, words, size


def _in_words(flat: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    return [f"{name} {_brief(flat[name])} -> {_brief(value)}" for name, value in changes.items()]


def _smaller_image(flat: Mapping[str, Any], side: int) -> int | None:
    """Side of a smaller image, for plain hosts with more than 24 x 24 patches."""
    if "window_spec" in flat:  # SAM's Hiera: any number of windows
        return WINDOW_PIXELS if side > WINDOW_PIXELS else None
    patch = flat.get("patch_size")
    if not isinstance(patch, int) or not isinstance(flat.get("depth"), int):
        return None
    if patch == 1:  # patches of the output of a convolutional stem
        return STEM_PIXELS if side > STEM_PIXELS else None
    if side // patch <= MANY_PATCHES:
        return None
    return PIXELS if "embed_layer" in flat else patch * FEW_PATCHES


def _shallower(flat: Mapping[str, Any], longest: int) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    before = after = last = 0
    for name in DEPTH:
        value = flat.get(name)
        if not value:
            continue
        smaller = _fewer(value, longest)
        if name in ("depth", "depths", "layers", "stages"):
            before, after = _total(value), _total(smaller)
            last = _end_of_longest(smaller)
        if smaller != value:
            changes[name] = smaller
    for name in BLOCK_NUMBERS:
        if flat.get(name) and after < before:
            changes[name] = type(flat[name])([last - 1])
    if "local_up_to_layer" in flat and after:
        changes["local_up_to_layer"] = flat["local_up_to_layer"] * after // before
    for name in PER_BLOCK:
        value = flat.get(name)
        depth = changes.get("depth", changes.get("depths"))
        if isinstance(value, tuple) and isinstance(depth, int) and len(value) == before:
            changes[name] = value[-depth:]
        elif isinstance(value, tuple) and isinstance(depth, tuple | list):
            cut = tuple(
                v[:d] if isinstance(v, tuple) else v for v, d in zip(value, depth, strict=False)
            )
            if cut != value:
                changes[name] = cut
    return changes


def _fewer(value: Any, longest: int) -> Any:
    """Fewer blocks: 12 -> 4, (2, 2, 18, 2) -> (2, 2, 4, 2), also nested ones."""
    if isinstance(value, int):
        return min(value, longest)
    if all(isinstance(v, int) for v in value):
        most = list(value).index(max(value))
        fewer = [min(v, longest if i == most else OTHERS) for i, v in enumerate(value)]
    else:
        fewer = [[min(v, OTHERS) for v in part] for part in value]
    return type(value)(fewer)


def _end_of_longest(value: Any) -> int:
    """Number of the last block of the longest stage."""
    if isinstance(value, int):
        return value - 1
    most = list(value).index(max(value))
    return sum(map(_total, value[: most + 1])) - 1


def _total(value: Any) -> int:
    return value if isinstance(value, int) else sum(map(_total, value))


def _narrower(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer heads, and channels in proportion: a head keeps its width."""
    if flat.get("base_dims"):  # channels of one head
        common = math.gcd(*_leaves(flat["heads"]))
        return {"heads": _divided(flat["heads"], common)} if common > 1 else {}
    heads = {n: flat[n] for n in HEADS if flat.get(n)}
    widths = {n: flat[n] for n in WIDTH if flat.get(n)}
    if not widths or "crpe_window" in flat:  # CoaT names its heads one by one
        return {}
    common = math.gcd(*_leaves([*heads.values(), *widths.values()]))
    if heads:
        fewest = min(_leaves([*heads.values()]))
        least = 2 if isinstance(flat.get("depth"), int) else 1
        factors = [d for d in range(1, common + 1) if common % d == 0 and fewest // d >= least]
        factor = max(factors, default=1)
    else:
        factor = common // HEAD_WIDTH if common % HEAD_WIDTH == 0 else 1
    if factor == 1:
        return {}
    return {name: _divided(value, factor) for name, value in (*heads.items(), *widths.items())}


def _leaves(value: Any) -> list[int]:
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _divided(value: Any, factor: int) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_divided(part, factor) for part in value)
    return value // factor


def _brief(value: Any) -> str:
    return repr(value).replace(" ", "") if isinstance(value, tuple | list) else str(value)
