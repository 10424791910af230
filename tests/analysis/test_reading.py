"""Blocks and facts that no adapter names: found in the graph, overridden by an `ArchSpec`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tokenprune.analysis.equations import Equation
from tokenprune.analysis.residual import find_stretches
from tokenprune.errors import PlanError, TokenPruneError, TokenPruneWarning, UnsupportedHostError
from tokenprune.tracing.host_graph import trace

WIDTH, HEADS = 16, 2
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, kind: str = "fused") -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.kind == "fused":
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
            z = torch.einsum("...ij,...jd->...id", weights, v)
        y: Tensor = self.out(z.transpose(1, 2).flatten(2))
        return y


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))


class Pairs(nn.Module):
    """`for attention, feed in layers`: no module is a block."""

    def __init__(self, depth: int = 3, kind: str = "fused") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 18, WIDTH))
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(kind), feed_forward()]) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 5)
        self.drop = nn.Dropout(0.3)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.places
        y: Tensor = self.drop(x)  # in training, equal tokens are no longer equal after it
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        y: Tensor = self.head(x[:, 0])
        return y


class Again(Pairs):
    """One pair, run three times, with a gate; the sequence comes first."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).transpose(0, 1)
        ((attention, feed),) = self.layers
        for _ in range(3):
            x = 0.6 * x + 0.4 * attention(x.transpose(0, 1)).transpose(0, 1)
            x = 0.6 * x + 0.4 * feed(x)
        y: Tensor = self.head(x[0])
        return y


class Dense(Pairs):
    """Gives a map of the image, of all patches."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        return x[:, 2:].transpose(1, 2).reshape(len(x), WIDTH, 4, 4)


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (Pairs, ("layers.0", "layers.1", "layers.2")),
        (lambda: Pairs(kind="einsum"), ("layers.0", "layers.1", "layers.2")),
        (lambda: Again(depth=1), ("layers.0", "layers.0", "layers.0")),
    ],
    ids=["pairs", "einsum", "shared, sequence first"],
)
def test_blocks_and_prefix_are_found_in_the_graph(
    make: Callable[[], nn.Module], paths: tuple[str, ...]
) -> None:
    for how in (None, "merge-k0.7"):
        model = tokenprune.wrap(make(), how, example_inputs=IMAGES)  # proven by `wrap`
        spec, plan = model._pruning.spec, model._pruning.plan
        assert spec.blocks == paths
        assert plan.num_prefix == 2
        assert plan.blocks[-2:] == (1, 2)
        dense = make().eval()(IMAGES)
        assert not torch.allclose(model.eval()(IMAGES), dense)
        model.set_keep_ratio(1.0)
        assert torch.equal(model(IMAGES), dense)


def test_a_saved_model_finds_its_blocks_again(tmp_path: Path) -> None:
    model = tokenprune.wrap(Pairs(), example_inputs=IMAGES).eval()
    tokenprune.save(model, tmp_path)
    again = tokenprune.load(tmp_path, Pairs(), example_inputs=IMAGES).eval()
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_a_later_call_finds_the_same_blocks() -> None:
    model = tokenprune.wrap(Pairs(), example_inputs=IMAGES).eval()
    once = model(torch.cat([IMAGES, IMAGES[:1]]))
    assert torch.allclose(once[:2], model(IMAGES), atol=1e-5)
    model.train()(IMAGES).sum().backward()
    assert model._pruning.plan.num_prefix == 2
    grads = [p.grad for name, p in model.named_parameters() if name.startswith("token_predictors")]
    assert all(grad is not None for grad in grads)


def test_an_arch_spec_overrides_each_fact() -> None:
    spec = tokenprune.ArchSpec(blocks=("layers.0", "layers.2"), num_prefix_tokens=1)
    model = tokenprune.wrap(Pairs(), example_inputs=IMAGES, adapter=spec)
    assert model._pruning.spec.blocks == ("layers.0", "layers.2")
    assert model._pruning.plan.num_prefix == 1


class Pooled(Pairs):
    """Half of the tokens are left after the first pair."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for number, (attention, feed) in enumerate(self.layers):
            x = attention(x) + x
            x = feed(x) + x
            x = x.reshape(len(x), 9, 2, WIDTH).mean(2) if number == 0 else x
        y: Tensor = self.head(x.mean(1))
        return y


def test_named_blocks_keep_their_numbers() -> None:
    spec = tokenprune.ArchSpec(blocks=("layers.0", "layers.1", "layers.2"), num_prefix_tokens=0)
    asked = {"version": 1, "scorer": "token-norm", "stages": [{"block": 1, "keep_ratio": 0.5}]}
    model = tokenprune.wrap(Pooled(), asked, example_inputs=IMAGES, adapter=spec, train=False)
    assert model._pruning.spec.blocks == spec.blocks
    asked["stages"] = [{"block": 0, "keep_ratio": 0.5}, {"block": 1, "keep_ratio": 0.3}]
    with pytest.raises(PlanError, match="Put all stages into one stretch, such as blocks 0 to 0"):
        tokenprune.wrap(Pooled(), asked, example_inputs=IMAGES, adapter=spec, train=False)


class WithText(Pairs):
    """A tower of another input runs first, with blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = nn.ModuleList(nn.ModuleList([Attention(), feed_forward()]) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for attention, feed in self.texts:
            text = attention(text) + text
            text = feed(text) + text
        y: Tensor = super().forward(x) + self.head(text.mean(1))
        return y


def test_a_later_call_is_pruned_in_the_blocks_that_were_found() -> None:
    given, asked = {"x": IMAGES, "text": torch.randn(2, 7, WIDTH)}, "token-norm-k0.7"
    model = tokenprune.wrap(WithText(), asked, example_inputs=given, train=False).eval()
    found = ("layers.0", "layers.1", "layers.2")
    for length in (7, 18):  # as many as there are image tokens
        model(IMAGES, torch.randn(2, length, WIDTH))
        assert model._pruning.spec.blocks == found
    host = tokenprune.unwrap(model)
    host.layers = nn.ModuleList()
    with pytest.raises(PlanError, match=r"runs other blocks, .* Unwrap it, and wrap it again"):
        model(IMAGES, torch.randn(2, 9, WIDTH))


class Apart(Pairs):
    """Attentions and feed-forwards stand side by side, as attributes of the host."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        for number in range(2):
            setattr(self, f"attn{number}", Attention())
            setattr(self, f"ff{number}", feed_forward())

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for number in range(2):
            x = x + getattr(self, f"attn{number}")(x)
            x = x + getattr(self, f"ff{number}")(x)
        y: Tensor = self.head(x[:, 0])
        return y


class Sums(Pairs):
    """Residual sums of these kinds, in this order: (a)ttention, (f)eed-forward, (b)oth beside each
    other."""

    def __init__(self, kinds: str) -> None:
        super().__init__(depth=len(kinds))
        self.kinds = kinds

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for kind, (attention, feed) in zip(self.kinds, self.layers, strict=True):
            if kind == "b":
                x = x + (attention(x) + feed(x))
            else:
                x = x + (attention(x) if kind == "a" else feed(x))
        y: Tensor = self.head(x[:, 0])
        return y


@pytest.mark.parametrize(
    ("kinds", "first"),
    [
        ("bbbf", (0, 1, 2)),
        ("aaaf", (0, 1, 2)),
        ("aafaaf", (0, 3)),
        ("afaafaf", (0, 2, 3, 5)),
        ("aa", (0, 1)),
    ],
)
def test_where_blocks_begin(kinds: str, first: tuple[int, ...]) -> None:
    traced = trace(Sums(kinds).eval(), {"x": IMAGES})
    calls = find_stretches(Sums(kinds), traced)
    assert [call.path.split(".")[1] for call in calls] == [str(number) for number in first]


def test_what_a_refusal_recommends_helps() -> None:
    wrong = tokenprune.ArchSpec(blocks=("layers.0", "layers.7"))
    with pytest.raises(UnsupportedHostError, match=r"does not have: \['layers.7'\]"):
        tokenprune.wrap(Pairs(), example_inputs=IMAGES, adapter=wrong)
    for make, paths in ((Pairs, ("layers.0", "layers.1", "layers.2")), (Apart, ("attn0", "attn1"))):
        wrong = tokenprune.ArchSpec(blocks=("layers",))
        with pytest.raises(UnsupportedHostError, match="named, but no module at these") as caught:
            tokenprune.wrap(make(), example_inputs=IMAGES, adapter=wrong)
        recommended = re.search(r"adapter=(ArchSpec\(.*\))\.$", str(caught.value))
        assert recommended is not None
        spec = eval(recommended[1], {"ArchSpec": tokenprune.ArchSpec})
        model = tokenprune.wrap(
            make(), "token-norm-k0.7", example_inputs=IMAGES, adapter=spec, train=False
        )
        assert model._pruning.spec.blocks == paths


def test_a_map_of_all_patches_is_of_restored_tokens_or_served_by_bypass_and_that_is_said() -> None:
    with pytest.warns(TokenPruneWarning, match="wrapped with `mode: bypass`.*Tokens cannot leave"):
        model = tokenprune.wrap(Dense(), example_inputs=IMAGES).eval()
    assert model._pruning.method.reduction.name == "bypass"
    assert model(IMAGES).shape == (2, WIDTH, 4, 4)
    asked = {"version": 1, "mode": "remove", "schedule": {"keep_ratio": 0.7}}
    for recipe in (None, asked):
        model = tokenprune.wrap(Dense(), recipe, example_inputs=IMAGES, restore=True).eval()
        assert model._pruning.method.reduction.name == "remove"  # and put back before the map
        assert model(IMAGES).shape == (2, WIDTH, 4, 4)


def test_no_warning_is_of_a_reading_that_was_refused(recwarn: pytest.WarningsRecorder) -> None:
    class OneToken(Pairs):
        """Reads one patch in eval, all of them in training."""

        def forward(self, x: Tensor) -> Tensor:
            x = self.tokens(x)
            for attention, feed in self.layers:
                x = attention(x) + x
                x = feed(x) + x
            if self.training:
                return x[:, 2:].transpose(1, 2).reshape(len(x), WIDTH, 4, 4)
            return x[:, 7]

    host = OneToken().eval()
    model = tokenprune.wrap(host, "token-norm-k0.7", example_inputs=IMAGES, restore=True)
    model.train()(IMAGES)
    assert [str(warning.message).split(":")[0] for warning in recwarn] == ["mode"]


def test_no_other_exception_leaves_wrap() -> None:
    class Odd(Pairs):
        def named_buffers(self, *_: Any, **__: Any) -> Any:
            raise LookupError("of the host's own")

    with pytest.raises(TokenPruneError, match=r"test_reading.py:\d+ .*LookupError: of the h") as it:
        tokenprune.wrap(Odd(), example_inputs=IMAGES)
    assert isinstance(it.value.__cause__, LookupError)


def test_a_host_that_does_not_attend_is_refused() -> None:
    class Plain(Pairs):
        def forward(self, x: Tensor) -> Tensor:
            x = self.tokens(x)
            for _, feed in self.layers:
                x = feed(x) + x
            return x[:, 0]

    with pytest.raises(UnsupportedHostError, match="No transformer block is found in Plain"):
        tokenprune.wrap(Plain(), example_inputs=IMAGES)


@pytest.mark.parametrize(
    ("text", "ranks", "summed", "output"),
    [
        ("bhid,bhjd->bhij", [4, 4], ["d"], tuple("bhij")),
        ("...ij,...jd->...id", [4, 4], ["j"], ("1", "0", "i", "d")),
        ("bnd,nd", [3, 2], ["n", "d"], ("b",)),
    ],
)
def test_equations_say_what_is_summed(
    text: str, ranks: list[int], summed: list[str], output: tuple[str, ...]
) -> None:
    equation = Equation.of(text, ranks)
    assert equation.summed() == summed
    assert equation.output == output


class Detects(Pairs):
    """Detection tokens stand after the patches, and are what the host returns."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).roll(-2, 1)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        y: Tensor = self.head(x[:, -2:])
        return y


def test_tokens_after_the_patches_always_stay() -> None:
    for how in (None, "token-norm-k0.7"):
        model = tokenprune.wrap(Detects(), how, example_inputs=IMAGES)  # mask = gather
        plan = model._pruning.plan
        assert (plan.num_prefix, plan.num_suffix) == (0, 2)
        _, trace = model.eval()(IMAGES, return_trace=True)
        for stage in trace.stages:
            assert (stage.keep_indices[:, -2:] == torch.tensor([16, 17])).all()
    _, trace = tokenprune.wrap(Detects(), example_inputs=IMAGES).train()(IMAGES, return_trace=True)
    assert all((stage.decision[:, -2:] == 1).all() for stage in trace.stages)
