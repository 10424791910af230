"""Adapters find the right facts, the generic one the same, and what they cannot tell they say."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenprune.adapters
from tests.zoo.hosts import HF, TEXT, ZOO, plain_vit, registry
from tests.zoo.images import ODD_IMAGES
from tests.zoo.rows import Row
from tests.zoo.sequences import SEQUENCES
from tokenprune.errors import AdapterError, UnknownAdapterError, UnsupportedHostError
from tokenprune.hosts import registry as arch
from tokenprune.hosts.inputs import draw_inputs
from tokenprune.hosts.registry import describe, list_adapters, register_adapter
from tokenprune.hosts.spec import ArchSpec

ROWS = [pytest.param(row, id=row.name) for row in ZOO]
SHIPPED = 40
ODD = (*ODD_IMAGES, *SEQUENCES)  # what only their own adapters can tell, or the generic alone


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    list_adapters()
    monkeypatch.setattr(arch, "_registry", dict(arch._registry))


class Fake:
    """An adapter that takes every host."""

    def __init__(self, name: str) -> None:
        self.name = name

    def matches(self, host: nn.Module) -> bool:
        return True

    def describe(self, host: nn.Module) -> ArchSpec:
        return ArchSpec(adapter=self.name, blocks=("blocks.0",), num_prefix_tokens=0)


class Layer(nn.Module):
    """A transformer block that no library knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.ff = nn.Sequential(nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, width))

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(self.to_q(x), k, v)
        return x + self.ff(x)


class Plain(nn.Module):
    """A host of no known family: a class and two storage tokens, layers that run in `order`."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), image_size: int | None = 16) -> None:
        super().__init__()
        self.order = order
        if image_size is not None:
            self.image_size = image_size
        self.stem = nn.Conv2d(1, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(8))
        self.storage_tokens = nn.Parameter(torch.zeros(1, 2, 8))
        self.stages = nn.ModuleList(
            [nn.ModuleList([Layer(8), Layer(8)]), nn.ModuleList([Layer(8)])]
        )
        self.ln = nn.LayerNorm(8)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.stem(pictures).flatten(2).transpose(1, 2)
        prefix = torch.cat([self.cls_token.expand(1, 1, 8), self.storage_tokens], dim=1)
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        layers = [layer for stage in self.stages for layer in stage]
        for number in self.order:
            x = layers[number](x)
        return self.ln(x)[:, 0]


@pytest.mark.parametrize("row", ROWS)
def test_each_host_of_the_zoo_is_described(row: Row) -> None:
    host = row.build()
    spec = describe(host)
    assert spec.adapter == row.family
    assert len(spec.blocks) == row.num_blocks
    assert spec.num_prefix_tokens == row.num_prefix
    assert spec.mode == row.mode
    kinds = {type(host.get_submodule(path)) for path in spec.blocks}
    assert len(kinds) == 1
    with torch.no_grad():
        drawn = draw_inputs(spec, host, batch_size=3)
        output = host(**drawn)
    first = output if isinstance(output, Tensor) else next(iter(output.values()))
    assert first.shape[0] == 3
    usual = row.inputs(3)
    assert {name: value.shape for name, value in drawn.items()} == {
        name: usual[name].shape for name in drawn
    }
    assert usual.keys() - drawn.keys() <= {"attention_mask"}  # no sound is padded unasked


@pytest.mark.parametrize("row", ROWS)
def test_the_final_norm_sees_every_token(row: Row) -> None:
    host = row.build()
    spec = describe(host)
    if spec.norm is None:
        known = {"clip_hf", "clip_tower", "metaclip_2", "swin_v2_cr", "donut"}
        assert row.name in known or row in ODD
        return
    seen: dict[str, Tensor] = {}
    for path in (spec.norm, spec.blocks[-1]):
        host.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.__setitem__(path, output)
        )
    with torch.no_grad():
        host(**row.inputs(2))
    last = seen[spec.blocks[-1]]
    last = last if isinstance(last, Tensor) else last[0]
    assert seen[spec.norm].shape == last.shape


@pytest.mark.parametrize("row", [row for row in ROWS if row.values[0] not in ODD])
def test_the_generic_adapter_finds_the_same_facts(row: Row) -> None:
    host = row.build()
    mine = describe(host)
    found = describe(host, "generic")
    assert found.blocks == mine.blocks
    assert found.norm == mine.norm
    assert found.mode == mine.mode
    assert found.num_prefix_tokens == mine.num_prefix_tokens
    assert found.notes


def test_inputs_follow_the_size_that_was_built() -> None:
    host = registry("deit_tiny_patch16_224", img_size=(24, 40), in_chans=1)
    assert host.pretrained_cfg["input_size"] == (3, 224, 224)
    assert describe(host).inputs["x"].shape == (1, 24, 40)


def test_a_subclass_is_still_of_its_family() -> None:
    class Mine(timm.models.vision_transformer.VisionTransformer):
        pass

    host = Mine(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    assert describe(host).adapter == "timm/vision_transformer"


def test_only_the_image_tower_of_a_dual_model_is_described() -> None:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=HF)
    spec = describe(transformers.CLIPModel(config))
    assert spec.blocks == tuple(f"vision_model.encoder.layers.{i}" for i in range(2))
    assert spec.inputs["pixel_values"].shape == (3, 32, 32)
    assert (spec.inputs["input_ids"].shape, spec.inputs["input_ids"].high) == ((8,), 50)


def test_a_text_tower_alone_is_refused_by_the_image_adapter() -> None:
    host = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    with pytest.raises(UnsupportedHostError, match="no CLIPEncoderLayer that works on image pat"):
        describe(host)


def test_a_host_without_its_blocks_is_refused() -> None:
    host = plain_vit()
    host.blocks = nn.Sequential()
    with pytest.raises(UnsupportedHostError, match="'timm/vision_transformer' found no blocks in"):
        describe(host)


@pytest.mark.parametrize("model", ["resnet50", "convnext_atto"])
def test_a_host_without_attention_is_refused(model: str) -> None:
    with torch.device("meta"):
        host = timm.create_model(model)
    with pytest.raises(UnsupportedHostError, match="found no stack of transformer blocks in "):
        describe(host)


def test_generic_describes_a_host_of_no_known_family() -> None:
    spec = describe(Plain())
    assert spec.adapter == "generic"
    assert spec.blocks == ("stages.0.0", "stages.0.1", "stages.1.0")
    assert spec.num_prefix_tokens == 3
    assert spec.norm == "ln"
    assert spec.mode == "remove"
    assert spec.inputs["pictures"].shape == (1, 16, 16)
    assert spec.notes == (
        "3 blocks of class Layer, from stages.0.0",
        "run without weights: blocks 0 to 2 take [B, 19, 8]",
        "3 prefix tokens: 19 tokens less a grid of 4 x 4",
    )


def test_generic_without_an_input_shape_looks_at_parameters() -> None:
    spec = describe(Plain(image_size=None))
    assert dict(spec.inputs) == {}
    assert spec.num_prefix_tokens == 3
    assert "3 prefix tokens: parameters cls_token, storage_tokens" in spec.notes
    assert any("no input shape is known" in note for note in spec.notes)


def test_generic_counts_blocks_in_the_order_they_run() -> None:
    spec = describe(Plain(order=(2, 0)))
    assert spec.blocks == ("stages.1.0", "stages.0.0")


def test_generic_counts_a_block_once_for_each_time_it_runs() -> None:
    spec = describe(Plain(order=(0, 1, 1)))
    assert spec.blocks == ("stages.0.0", "stages.0.1", "stages.0.1")


def test_generic_names_no_blocks_that_never_run() -> None:
    with pytest.raises(UnsupportedHostError, match="3 blocks of class Layer do not run as modules"):
        describe(Plain(order=()))


def test_generic_does_not_count_a_class_token_that_joins_later() -> None:
    host = registry("cait_xxs24_224")
    spec = describe(host)
    assert host.cls_token.shape[1] == 1
    assert spec.num_prefix_tokens == 0
    assert any(
        note.startswith("left out: 2 blocks of class LayerScaleBlockClass") for note in spec.notes
    )


def test_generic_finds_the_stages_of_a_hierarchy() -> None:
    with torch.device("meta"):
        spec = describe(timm.create_model("pvt_v2_b0"))
    assert (spec.mode, len(spec.blocks)) == ("bypass", 8)
    assert spec.blocks[2] == "stages.1.blocks.0"
    assert any("2 to 3 take [B, 784, 64]" in note for note in spec.notes)


def test_generic_describes_a_text_encoder() -> None:
    sizes = {**TEXT, "num_hidden_layers": 3}
    config = transformers.BertConfig(**sizes)
    spec = describe(transformers.BertForSequenceClassification(config))
    assert spec.blocks == tuple(f"bert.encoder.layer.{i}" for i in range(3))
    assert (spec.num_prefix_tokens, spec.mode) == (1, "remove")
    assert spec.inputs["attention_mask"].ones


def test_generic_leaves_the_caches_of_a_library_alone() -> None:
    class Inside(nn.Module):
        """DINOv3 in a class of the user's; its coordinates come from a cache of transformers."""

        def __init__(self) -> None:
            super().__init__()
            sizes = {**HF, "image_size": 40}  # a size that no other test puts into that cache
            config = transformers.DINOv3ViTConfig(**sizes, num_register_tokens=2)
            self.image_size, self.tower = 40, transformers.DINOv3ViTModel(config)

        def forward(self, images: Tensor) -> Tensor:
            return self.tower(images).pooler_output

    host = Inside().eval()
    spec = describe(host)
    assert (spec.adapter, spec.num_prefix_tokens) == ("generic", 3)
    output = host(torch.zeros(1, 3, 40, 40))
    assert type(output) is Tensor
    assert output.isfinite().all()


def test_generic_leaves_the_host_as_it_was() -> None:
    host = timm.create_model("levit_128s").eval()  # keeps tables it made in eval
    host.stages[0].train()
    modes = [module.training for module in host.modules()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    spec = describe(host, "generic")
    assert any(note.startswith("run without weights") for note in spec.notes)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in host.modules()]
    assert not any(module._forward_pre_hooks for module in host.modules())
    caches = [m.attention_bias_cache for m in host.modules() if hasattr(m, "attention_bias_cache")]
    assert caches
    assert not any(caches)


@pytest.mark.parametrize(
    ("asked", "near"), [("timm/beitt", "'timm/beit'"), ("transformers/dinov3", "'transformers/di")]
)
def test_an_unknown_adapter_names_the_nearest(asked: str, near: str) -> None:
    with pytest.raises(UnknownAdapterError, match=f"named '{asked}'.*Did you mean .*{near}"):
        describe(plain_vit(), asked)


def test_paths_that_the_host_lacks_are_named() -> None:
    spec = ArchSpec(adapter="by hand", blocks=("blocks.0", "blocks.9"), num_prefix_tokens=1)
    with pytest.raises(UnsupportedHostError, match=r"'by hand' names modules .*'blocks\.9'"):
        describe(plain_vit(), spec)


@pytest.mark.usefixtures("own_registry")
def test_an_adapter_registered_later_is_asked_first() -> None:
    register_adapter(Fake("mine"))
    assert describe(plain_vit()).adapter == "mine"
    assert "mine" in list_adapters()


@pytest.mark.usefixtures("own_registry")
def test_a_name_is_registered_once() -> None:
    with pytest.raises(AdapterError, match="named 'timm/eva' is registered already"):
        register_adapter(Fake("timm/eva"))
    register_adapter(Fake("timm/eva"), replace=True)
    assert describe(plain_vit(), "timm/eva").blocks == ("blocks.0",)


@pytest.mark.parametrize("thing", [nn.Identity(), "timm/eva"])
def test_what_is_no_adapter_is_refused(thing: Any) -> None:
    with pytest.raises(AdapterError, match=r"is no adapter: it needs a `name`"):
        register_adapter(thing)


def test_registering_all_again_changes_nothing() -> None:
    before = list_adapters()
    tokenprune.adapters.register_all()
    assert list_adapters() == before
    assert len(before) == SHIPPED


def test_the_folder_under_another_name_is_refused() -> None:
    place = importlib.util.spec_from_file_location("adapters", tokenprune.adapters.__file__)
    module = importlib.util.module_from_spec(place)
    with pytest.raises(ImportError, match=r"imported as 'adapters'. Import `tokenprune\.adapters`"):
        place.loader.exec_module(module)


@pytest.mark.slow
def test_adapters_import_no_model_library() -> None:
    code = (
        "import sys; from tokenprune.hosts.registry import list_adapters; "
        f"assert len(list_adapters()) == {SHIPPED}; "
        "assert not {'timm', 'transformers', 'torchvision'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
