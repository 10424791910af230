"""A wrapped model in use: `using`, `set_keep_ratio`, traces, arguments, and what each refuses."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokenprune
from tokenprune.errors import HostError, KeepIndicesError, PlanError
from tokenprune.runtime.model import pruning_of
from tokenprune.scorers.protocol import PREDICTORS

RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.7}}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SETS = [torch.tensor([[1, 3, 5], [0, 2, 9]]), torch.tensor([[3], [9]])]


class Vit(timm.models.vision_transformer.VisionTransformer):
    """A host with arguments of several kinds."""

    def forward(self, x: Tensor, scale: float = 1.0, names: Any = None, **more: Any) -> Tensor:
        return super().forward(x) * scale


def build(cls: type[nn.Module] = timm.models.vision_transformer.VisionTransformer) -> nn.Module:
    torch.manual_seed(0)
    host = cls(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5)
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return host


@pytest.fixture(scope="module")
def shared() -> Any:
    return tokenprune.wrap(build(), RECIPE, verify=False, train=False)


@pytest.fixture
def model(shared: Any) -> Any:
    """One model for the tests that leave it as they found it, modes and ratios aside."""
    shared.set_keep_ratio(0.7)
    return shared.eval()


@pytest.fixture
def own_model() -> Any:
    return tokenprune.wrap(build(), RECIPE, verify=False, train=False).eval()


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_the_path_is_that_of_the_mode_unless_it_is_forced(model: Any) -> None:
    def path() -> str:
        _, trace = model(IMAGES, return_trace=True)
        if not trace.stages:
            return "dense"
        return "mask" if trace.stages[0].keep_indices is None else "gather"

    assert path() == "gather"
    for forced in ("dense", "mask", "gather"):
        with model.using(forced) as same:
            assert same is model
            assert path() == forced
            assert not model.training
    model.train()
    assert path() == "mask"
    with model.using("gather"):
        assert path() == "gather"


def test_blocks_of_using_lie_in_each_other(model: Any) -> None:
    plain = model(IMAGES)
    with model.using(keep_indices=SETS):
        forced = model(IMAGES)
        assert not torch.allclose(forced, plain)
        with model.using("mask"):  # the sets stay
            torch.testing.assert_close(model(IMAGES), forced)
        with model.using(keep_indices=[SETS[0], SETS[0][:, :1]]):
            assert not torch.allclose(model(IMAGES), forced)
        assert torch.equal(model(IMAGES), forced)
    assert torch.equal(model(IMAGES), plain)


def test_using_ends_when_an_error_passes_through(model: Any) -> None:
    plain = model(IMAGES)
    with pytest.raises(KeyError, match="mine"), model.using("dense", keep_indices=SETS):
        raise KeyError("mine")
    assert torch.equal(model(IMAGES), plain)


def test_kept_sets_in_any_order(model: Any) -> None:
    with model.using(keep_indices=SETS):
        expected = model(IMAGES)
    with model.using(keep_indices=[SETS[0].flip(1), SETS[1].to(torch.int32)]):
        assert torch.equal(model(IMAGES), expected)
        _, trace = model(IMAGES, return_trace=True)
    assert trace.stages[0].keep_indices.tolist() == SETS[0].tolist()


def test_the_noise_is_that_of_the_generator(model: Any) -> None:
    model.train()

    def decisions(seed: int) -> Tensor:
        with model.using(generator=torch.Generator().manual_seed(seed)):
            return model(IMAGES, return_trace=True)[1].stages[0].decision

    assert torch.equal(decisions(1), decisions(1))
    assert not torch.equal(decisions(1), decisions(2))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (SETS[:1], r"for 1 stages; the plan has 2, at blocks \[1, 2\]"),
        ([*SETS, SETS[1]], "for 3 stages; the plan has 2"),
        ([SETS[0][0], SETS[1]], r"\[B, K\] tensors of whole numbers.*found 'shape \(3,\)'"),
        ([[1, 2], SETS[1]], r"\[B, K\] tensors .*found \[1, 2\]"),
        ([SETS[0], torch.tensor([[3], [4]])], r"stage 1 keep patches \[4\] of image 1, which st"),
        ([s.float() for s in SETS], r"must hold integers, found torch\.float32"),
        ([s[:1] for s in SETS], r"shape \[2, K from 1 to 16\], found \[1, 3\]"),
        ([s[:, :0] for s in SETS], r"found \[2, 0\]"),
        ([SETS[0] + 13, SETS[1] + 13], r"image 0 hold 16, but there are 16 patch tokens"),
        ([SETS[0] - 1, SETS[1] - 1], r"image 1 hold -1, but there are 16"),
        ([SETS[0].clamp_min(2), SETS[1]], r"image 1 hold 2 twice"),
    ],
)
def test_kept_sets_that_make_no_sense(model: Any, sets: Any, says: str) -> None:
    plain = model(IMAGES)
    with pytest.raises(KeepIndicesError, match=says), model.using(keep_indices=sets):
        model(IMAGES)
    assert torch.equal(model(IMAGES), plain)


def test_a_path_that_there_is_not(model: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"no path 'gathered'.*dense, mask, gather"),
        model.using("gathered"),
    ):
        pass
    assert not pruning_of(model).overrides


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [(0.5, (8, 4)), (1.0, (16, 16)), ([0.9, 0.25], (14, 4)), ((0.5, 0.5), (8, 8)), (0.001, (1, 1))],
)
def test_ratios_are_set_without_another_trace(
    model: Any, ratio: Any, counts: tuple[int, ...]
) -> None:
    model(IMAGES)
    programs = list(pruning_of(model).cache)
    model.set_keep_ratio(ratio)
    _, trace = model(IMAGES, return_trace=True)
    assert tuple(stage.num_tokens for stage in trace.stages) == counts
    assert list(pruning_of(model).cache) == programs


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (0.0, r"keep_ratio=0\.0: every ratio must lie in \(0, 1\]"),
        (1.5, r"must lie in \(0, 1\]"),
        (float("nan"), r"must lie in \(0, 1\]"),
        (-0.5, r"must lie in \(0, 1\]"),
        ([0.5], r"1 ratios, but the plan has 2 stages, at blocks \[1, 2\]"),
        ([], "0 ratios, but the plan has 2 stages"),
        ([0.5, 0.6], "must not grow from stage to stage"),
        ("half", r"keep_ratio='half': give one number r for r, r\^2"),
        (None, "keep_ratio=None: give one number"),
        ([0.5, "x"], "one number per stage"),
    ],
)
def test_ratios_that_make_no_sense(model: Any, ratio: Any, says: str) -> None:
    before, plain = pruning_of(model).budget, model(IMAGES)
    with pytest.raises(PlanError, match=says):
        model.set_keep_ratio(ratio)
    assert pruning_of(model).budget is before
    assert torch.equal(model(IMAGES), plain)


def test_ratios_of_a_bypass_host_mean_the_same() -> None:
    torch.manual_seed(0)
    host = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(3, 1), num_heads=(2, 2), window_size=4
    )
    recipe = {"version": 1, "mode": "bypass", "schedule": {"blocks": [1, 2], "keep_ratio": 0.9}}
    model = tokenprune.wrap(host, recipe, verify=False, train=False).eval()
    for ratio, counts in ((0.5, [128, 64]), ([0.7, 0.7 - 0.2], [179, 128])):
        model.set_keep_ratio(ratio)
        _, trace = model(torch.zeros(1, 3, 32, 32), return_trace=True)
        assert [stage.num_tokens for stage in trace.stages] == counts


def test_a_trace_of_eval_and_of_training(model: Any) -> None:
    out, trace = model(IMAGES, return_trace=True)
    assert torch.equal(out, model(IMAGES))
    assert trace.patch_tokens.shape == (2, 7, 16)
    assert [stage.num_tokens for stage in trace.stages] == [11, 7]
    first, second = trace.stages
    for stage in trace.stages:
        assert stage.keep_logits.shape == (2, 16, 2)
        assert stage.decision.sum(dim=1).tolist() == [stage.num_tokens] * 2
    gone = first.decision == 0  # has no logits at the second stage any more
    assert second.keep_logits[gone].unique(dim=0).tolist() == [[float("-inf"), 0.0]]
    torch.testing.assert_close(second.keep_logits[~gone].exp().sum(-1), torch.ones(22))

    model.train()
    _, trace = model(IMAGES, return_trace=True)
    assert trace.patch_tokens.shape == (2, 16, 16)
    for stage in trace.stages:
        assert stage.keep_indices is None
        assert stage.num_tokens == stage.decision.sum(dim=1).mean()
    with model.using("dense"):
        assert not model(IMAGES, return_trace=True)[1].stages


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((IMAGES,), {"wrong": 1}, r"takes \(x, .*called with \(x, wrong\)"),
        ((IMAGES,), {"x": IMAGES}, r"called with \(x, x\)"),
        ((IMAGES, None, 1, 2, 3), {}, r"called with \(x, .*\.\.\.\)"),
        ((), {}, "called without a tensor"),
        ((IMAGES[:, :2],), {}, r"refused the input|cannot be traced.*2, 2, 32, 32"),
        ((IMAGES[..., :24],), {}, r"refused the input \{'x': \(2, 3, 32, 24\)\}"),
    ],
)
def test_calls_that_the_host_does_not_know(model: Any, args: Any, kwargs: Any, says: str) -> None:
    plain = model(IMAGES)
    with pytest.raises(tokenprune.errors.TokenPruneError, match=says):
        model(*args, **kwargs)
    assert torch.equal(model(IMAGES), plain)


def test_arguments_that_are_no_tensor() -> None:
    model = tokenprune.wrap(build(Vit), RECIPE, verify=False, train=False).eval()
    plain = model(IMAGES)
    torch.testing.assert_close(model(IMAGES, 2.0), plain * 2)
    torch.testing.assert_close(model(IMAGES, scale=3.0, names=None, extra="any"), plain * 3)
    with pytest.raises(HostError, match="Argument names of Vit is a object"):
        model(IMAGES, names=object())
    assert torch.equal(model(IMAGES), plain)


def test_loading_says_what_is_missing_and_what_is_too_much(model: Any) -> None:
    state = model.state_dict()
    lacking = f"{PREDICTORS}.0.in_proj.0.weight"
    part = {key: value for key, value in state.items() if key != lacking}
    found = model.load_state_dict({**part, f"{PREDICTORS}.9.x": torch.zeros(1)}, strict=False)
    assert found.missing_keys == [lacking]
    assert found.unexpected_keys == [f"{PREDICTORS}.9.x"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.in_proj\.0\.weight"):
        model.load_state_dict(part)
    foreign = {**state, "token_bypasses.1.0.weight": torch.zeros(1)}
    found = model.load_state_dict(foreign, strict=False)
    assert found.unexpected_keys == ["token_bypasses.1.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        model.load_state_dict({key: value for key, value in state.items() if key != "head.bias"})


class KeepsItsTable(timm.models.vision_transformer.VisionTransformer):
    """Keeps the table of the length it saw last."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dynamic_img_size=True, **options)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        if self.table is None or len(self.table) != length:
            self.table = torch.arange(length).sin()
        return super().forward(x + self.table)


@pytest.mark.slow
def test_what_the_host_kept_from_a_call_of_its_own_is_no_part_of_a_trace() -> None:
    host = build(KeepsItsTable).eval()
    model = tokenprune.wrap(host, RECIPE, verify=False, train=False)
    larger = torch.randn(2, 3, 48, 48)
    wanted = model(larger)
    again = tokenprune.wrap(build(KeepsItsTable).eval(), RECIPE, verify=False, train=False)
    again.load_state_dict(model.state_dict())
    pruning_of(again).host(larger)
    kept = pruning_of(again).host.table
    assert torch.equal(again(larger), wanted)
    assert pruning_of(again).host.table is kept


class NamedLikeOurs(timm.models.vision_transformer.VisionTransformer):
    """Has names that begin as ours do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.token_predictors_of_another_kind = nn.Linear(16, 16)
        self.forward_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.forward_scale


def test_names_that_begin_as_ours_are_the_hosts() -> None:
    model = tokenprune.wrap(build(NamedLikeOurs), RECIPE, verify=False, train=False).eval()
    plain = model(IMAGES)
    model.forward_scale = 2.0
    assert tokenprune.unwrap(model).forward_scale == 2.0
    torch.testing.assert_close(model(IMAGES), plain * 2)
    found = model.load_state_dict({key: v + 1 for key, v in model.state_dict().items()})
    assert not found.missing_keys
    assert not found.unexpected_keys


def test_what_belongs_to_one_module_object_stays_there(own_model: Any) -> None:
    """`compile` and replicas write into the object they are called on."""
    host = tokenprune.unwrap(own_model)
    kind, pruned = type(host), own_model(IMAGES)
    own_model.compile(backend="eager")
    assert host._compiled_call_impl is None
    own_model._compiled_call_impl = None
    assert type(host) is kind
    torch.testing.assert_close(own_model(IMAGES), pruned)
    replica = own_model._replicate_for_data_parallel()
    replica.cls_token = torch.zeros(1, 1, 16)
    assert host.cls_token.requires_grad
    assert "blocks" in dict(host.named_children())
    with pytest.raises(HostError, match="Use DistributedDataParallel, one process a device"):
        replica(IMAGES)


def test_an_attribute_that_changes_is_read_in_every_mode(own_model: Any) -> None:
    """What `reset_classifier` sets decides in the host's Python code: eval must see it too."""
    own_model.reset_classifier(5, global_pool="avg")
    with own_model.using("gather", keep_indices=[torch.arange(16).expand(2, -1)] * 2):
        torch.testing.assert_close(own_model(IMAGES), tokenprune.unwrap(own_model)(IMAGES))


def test_loading_weights_of_another_mode(model: Any) -> None:
    bypassed = tokenprune.wrap(build(), {**RECIPE, "mode": "bypass"}, verify=False, train=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        bypassed.cls_token.add_(1)
    with pytest.raises(RuntimeError, match=r"'token_bypasses.*wrapped in mode 'remove' does not"):
        model.load_state_dict(bypassed.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Crowded(timm.models.vision_transformer.VisionTransformer):
    """A host whose own methods have names that the engine once had in front of them."""

    def _context(self, x: Tensor) -> Tensor:
        return x + 1

    def _programs(self, x: Tensor) -> Tensor:
        return x * 2

    def _signature(self) -> int:
        return 3

    def _analyse(self, x: Tensor) -> Tensor:
        return x - 1

    def run(self, x: Tensor) -> Tensor:
        return self._analyse(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._programs(self._context(self.run(x)))) * self._signature()


def test_methods_of_the_host_are_its_own_whatever_they_are_called() -> None:
    host = build(Crowded).eval()
    dense = host(IMAGES)
    model = tokenprune.wrap(host, RECIPE).eval()
    assert model._signature() == 3
    assert torch.equal(model._context(IMAGES), IMAGES + 1)
    model.set_keep_ratio(1.0)
    assert torch.equal(model(IMAGES), dense)
    own = {name for name in vars(type(model).__mro__[1]) if not name.startswith("__")}
    public = {"forward", "using", "set_budget", "set_keep_ratio", "set_threshold"}
    public |= {"load_state_dict", "save_pretrained", "push_to_hub"}
    of_torch = {"_get_name", "_modules", "_call_impl", "_compiled_call_impl"}
    assert own == public | of_torch | {"_pruning"}
    assert vars(model) is vars(host)


def test_a_budget_is_replaced_and_the_structure_never_is(own_model: Any) -> None:
    pruning = pruning_of(own_model)
    plan, budget = pruning.plan, pruning.budget
    programs, *_ = pruning.cache
    own_model.set_keep_ratio([0.9, 0.2])
    assert pruning.plan is plan is programs.analysis.plan
    assert pruning.budget != budget
    before = pruning.budget
    tokenprune.ImageMacs(own_model)
    tokenprune.profile(own_model, budget=budget)
    assert pruning.budget is before
    assert not {"keep_ratios", "threshold"} & set(vars(programs.analysis.plan))


def test_modules_that_return_what_they_are_given_are_not_called(own_model: Any) -> None:
    own_model(IMAGES)
    (programs,) = pruning_of(own_model).cache
    source = inspect.getsource(programs.get(own_model, "gather").run)
    assert ".proj(" in source
    assert "proj_drop" not in source
    assert "ls1" not in source


def test_a_copy_that_is_made_inside_of_using_is_not_forced(own_model: Any) -> None:
    wanted = own_model(IMAGES)
    with own_model.using("dense"):
        copies = copy.deepcopy(own_model), pickle.loads(pickle.dumps(own_model))
        assert not torch.equal(own_model(IMAGES), wanted)
    for copied in copies:
        assert torch.equal(copied(IMAGES), wanted)


class Twice:
    """A forward around another one, as accelerate's."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs) * 2


def test_copies_have_the_forward_that_was_set(own_model: Any) -> None:
    plain = own_model(IMAGES)
    own_model.forward = Twice(own_model.forward)
    copies = [copy.deepcopy(own_model), pickle.loads(pickle.dumps(own_model)), copy.copy(own_model)]
    for copied in (own_model, *copies):
        assert torch.equal(copied(IMAGES), plain * 2)
    del copies[0].forward
    assert torch.equal(copies[0](IMAGES), plain)
    assert torch.equal(own_model(IMAGES), plain * 2)
