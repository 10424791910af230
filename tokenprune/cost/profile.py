"""Count multiply-accumulates exactly, on any device, without doing the arithmetic.

The program that would run is interpreted on fake tensors, node by node, and operators are counted
by torch's formulas. What counts is what runs: fused attention included, predictors included.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokenprune.analysis.plan import Plan
from tokenprune.checks.verify import kept_modes
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.rewrite.rewrite import CONTEXT, PREDICTORS
from tokenprune.rewrite.stages import StageContext
from tokenprune.runtime.model import PrunedModel, pruning_of
from tokenprune.runtime.program import Programs
from tokenprune.tracing.interpret import evaluate, run
from tokenprune.tracing.state import buffers_kept
from tokenprune.tracing.tracer import enter_block

__all__ = ["Profile", "profile"]

# Fused attention operators that torch's counter does not know (2.14).
UNCOUNTED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


@dataclass(frozen=True)
class Profile:
    """Multiply-accumulates (MACs) and tokens of one image.

    Attributes:
        host: Class of the host.
        mode: `remove` or `bypass`.
        num_patches: N at the first stage.
        patches_per_stage: N of each stage; all the same where tokens leave.
        num_prefix_tokens: P; the blocks process these beside the patch tokens.
        stages: The block before which each stage stands.
        blocks: Module paths of the blocks.
        tokens_per_block: Patch tokens that enter each block; in bypass mode, those that go through
            its MLP.
        macs_per_block: MACs of each block, without the predictor that stands before it.
        dense_macs_per_block: The same for the host without pruning.
        predictor_macs: MACs of the predictor of each stage.
        macs: All of the pruned eval path: blocks, predictors, embedding, head.
        dense_macs: All of the host without pruning.
    """

    host: str
    mode: str
    num_patches: int
    patches_per_stage: tuple[int, ...]
    num_prefix_tokens: int
    stages: tuple[int, ...]
    blocks: tuple[str, ...]
    tokens_per_block: tuple[int, ...]
    macs_per_block: tuple[int, ...]
    dense_macs_per_block: tuple[int, ...]
    predictor_macs: tuple[int, ...]
    macs: int
    dense_macs: int

    @property
    def gmacs(self) -> float:
        """10^9 MACs of the path that eval runs."""
        return self.macs / 1e9

    @property
    def dense_gmacs(self) -> float:
        """10^9 MACs of the host without pruning."""
        return self.dense_macs / 1e9

    @property
    def ratio(self) -> float:
        """MACs relative to the dense host; below 1 if pruning saves any."""
        return self.macs / self.dense_macs

    @property
    def predictor_share(self) -> float:
        """Share of the predictors in all MACs."""
        return sum(self.predictor_macs) / self.macs

    @property
    def other_macs(self) -> int:
        """MACs outside of blocks and predictors: embedding, head."""
        return self.macs - sum(self.macs_per_block) - sum(self.predictor_macs)

    def __str__(self) -> str:
        lines = [
            f"{self.host}: {self.gmacs:.4g} GMACs, dense {self.dense_gmacs:.4g} "
            f"({100 * (self.ratio - 1):+.1f} %), predictors {100 * self.predictor_share:.1f} %",
            f"{'block':<24}{'tokens':>8}{'MMACs':>12}{'dense':>12}",
        ]
        predictors = dict(zip(self.stages, self.predictor_macs, strict=True))
        rows = zip(
            self.blocks,
            self.tokens_per_block,
            self.macs_per_block,
            self.dense_macs_per_block,
            strict=True,
        )
        for block, (path, tokens, macs, dense) in enumerate(rows):
            if block in predictors:
                before = f"predictor {self.stages.index(block)}"
                lines.append(f"{before:<32}{predictors[block] / 1e6:>12.3f}")
            lines.append(f"{path:<24}{tokens:>8}{macs / 1e6:>12.3f}{dense / 1e6:>12.3f}")
        lines.append(f"{'embedding, head':<32}{self.other_macs / 1e6:>12.3f}")
        return "\n".join(lines)


def profile(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Profile:
    """Count what a wrapped model costs in eval, per image.

    Nothing is computed and no weight is read, so random weights and big hosts are fine. With every
    keep_ratio at 1 the host itself runs, and that is what is counted. With a threshold images cost
    different amounts: this counts one that keeps as many tokens as the keep ratios say, and
    `ImageMacs` what given images cost.

    Args:
        model: What `wrap` returned.
        example_inputs: As for `wrap`; what the model was wrapped with if None.

    Raises:
        NotWrappedError: `model` is not wrapped.
        HostError: The inputs hold no tensor, or the host refuses them.
    """
    pruning = pruning_of(model)
    with kept_modes(model):
        model.eval()
        programs = _programs(model, example_inputs)
    spec, plan = pruning.spec, pruning.plan
    batch = programs.batch_size if programs.axes.batch_bound else 1
    inputs = _fake_inputs(programs, batch)
    dense = _dense(model, programs, inputs)
    if min(plan.keep_ratios) == 1.0:
        pruned = dense
    else:
        rewrite = programs.get(model, "gather").rewrite
        entries = {
            entry: rewrite.copy_of(_tokens_into(entry, programs))
            for entry in programs.traced.entries.values()
        }
        context = StageContext(num_keep=plan.counts(programs.num_patches), sample=False)
        pruned = _Count(model, programs, entries).over(rewrite.graph, {**inputs, CONTEXT: context})
    numbers = range(len(spec.blocks))
    tokens = {**pruned.tokens, **_through_mlp(programs, plan)}
    return Profile(
        host=type(model).__name__,
        mode=plan.mode,
        num_patches=programs.num_patches[0],
        patches_per_stage=programs.num_patches,
        num_prefix_tokens=plan.num_prefix_tokens,
        stages=plan.blocks,
        blocks=spec.blocks,
        tokens_per_block=tuple(tokens.get(b, 0) for b in numbers),
        macs_per_block=tuple(pruned.macs["block", b] // batch for b in numbers),
        dense_macs_per_block=tuple(dense.macs["block", b] // batch for b in numbers),
        predictor_macs=tuple(pruned.macs["predictor", s] // batch for s in range(len(plan.blocks))),
        macs=pruned.macs.total() // batch,
        dense_macs=dense.macs.total() // batch,
    )


def _programs(model: nn.Module, example_inputs: ExampleInputs | None) -> Programs:
    if example_inputs is None:
        known = list(pruning_of(model).programs.values())
        usual = [_shapes(programs) == _shapes(known[0]) for programs in known]
        for programs, like_wrap in zip(known, usual, strict=True):
            if like_wrap and _serves(programs, model):
                return programs
    return cast(PrunedModel, model)._programs(pruning_of(model).inputs(example_inputs))


def _dense(model: nn.Module, programs: Programs, inputs: Mapping[str, Any]) -> "_Counted":
    """The count of the host without pruning, made once for a trace and shapes of weights."""
    shapes = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    known = _dense_counts.setdefault(programs.traced.graph, {})
    if shapes not in known:
        host_graph = _Count(model, programs, {n: n for n in programs.traced.entries.values()})
        known[shapes] = host_graph.over(programs.traced.graph, inputs)
    return known[shapes]


def _shapes(programs: Programs) -> list[tuple[int, ...]]:
    """Of the inputs of one image; the first signature is the one that `wrap` traced."""
    values = [n.meta["val"] for n in programs.traced.graph.nodes if n.op == "placeholder"]
    return [tuple(value.shape[1:]) for value in values]


def _serves(programs: Programs, model: nn.Module) -> bool:
    """False if the model was moved or cast since that trace."""
    now = next(p for p in model.parameters() if p.is_floating_point())
    values = [n.meta["val"] for n in programs.traced.graph.nodes if n.op == "placeholder"]
    return all(
        v.device == now.device and (v.dtype == now.dtype or not v.is_floating_point())
        for v in values
    )


def _fake_inputs(programs: Programs, batch: int) -> dict[str, Any]:
    """Fake tensors like those of the trace, for `batch` images."""
    fakes = {}
    with programs.traced.fake_mode:
        for node in programs.traced.graph.nodes:
            if node.op == "placeholder":
                like = node.meta["val"]
                batched = like.ndim and like.shape[0] == programs.batch_size
                shape = (batch, *like.shape[1:]) if batched else tuple(like.shape)
                fakes[str(node.target)] = torch.empty(shape, dtype=like.dtype, device=like.device)
    return fakes


def _tokens_into(entry: fx.Node, programs: Programs) -> fx.Node:
    """The traced node whose copy holds what enters a block: markers of no stage are taken out."""
    removes = programs.plan.mode == "remove"
    stages = set(programs.traced.markers.values()) if removes else set()
    while entry.target is enter_block and entry not in stages:
        entry = entry.args[0]  # type: ignore[assignment]
    return entry


def _through_mlp(programs: Programs, plan: Plan) -> dict[int, int]:
    """Block -> kept tokens, for the blocks whose MLP dropped tokens go around (bypass mode)."""
    counts = plan.counts(programs.num_patches)
    return {block: counts[region.stage] for block, region in programs.regions.items()}


class _Counted(NamedTuple):
    """What one run cost.

    Attributes:
        macs: MACs by ("block", number), ("predictor", stage) or ("other", 0).
        tokens: Patch tokens that enter each block.
    """

    macs: Counter[tuple[str, int]]
    tokens: dict[int, int]


# By trace, then by the names and shapes of the weights: a head may be replaced.
_dense_counts: WeakKeyDictionary[fx.Graph, dict[Any, _Counted]] = WeakKeyDictionary()


class _Count:
    """Runs a graph on fake tensors and books each node's MACs."""

    def __init__(
        self, model: nn.Module, programs: Programs, entries: Mapping[fx.Node, fx.Node]
    ) -> None:
        pruning = pruning_of(model)
        self.model, self.programs = model, programs
        self.num_prefix = pruning.plan.num_prefix_tokens
        self.counted = _Counted(Counter(), {})
        self._blocks: dict[str, list[int]] = {}
        for block, path in enumerate(pruning.spec.blocks):
            self._blocks.setdefault(path, []).append(block)
        self._entered: dict[fx.Node, list[int]] = {}
        for block, entry in programs.traced.entries.items():
            self._entered.setdefault(entries[entry], []).append(block)

    def over(self, graph: fx.Graph, inputs: Mapping[str, Any]) -> _Counted:
        """Count one run of `graph`."""
        counter = _FlopCounter()

        def step(node: fx.Node, env: Any) -> Any:
            before = counter.total
            value = evaluate(self.model, node, env)
            flops = counter.total - before
            if flops:
                self.counted.macs[self._account(node)] += flops // 2
            return value

        kept = buffers_kept(self.model)
        with kept, torch.no_grad(), self.programs.traced.fake_mode, counter:
            for node, value in run(self.model, graph, inputs, step):
                for block in self._entered.get(node, ()):
                    self.counted.tokens[block] = self._patch_tokens(value)
        return self.counted

    def _account(self, node: fx.Node) -> tuple[str, int]:
        for used in node.all_input_nodes:
            first, _, rest = str(used.target).partition(".")
            if used.op == "get_attr" and first == PREDICTORS:
                return "predictor", int(rest.partition(".")[0])
        path = node.meta["where"].module
        while path:
            if path in self._blocks:
                calls = self._blocks[path]  # several, if the host calls one module again and again
                return "block", max(
                    (b for b in calls if b in self.counted.tokens), default=calls[0]
                )
            path = path.rpartition(".")[0]
        return "other", 0

    def _patch_tokens(self, value: Tensor) -> int:
        if value.ndim == 3:
            return int(value.shape[1]) - self.num_prefix
        return int(value[0, ..., 0].numel())


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of what runs, by torch's own formulas.

    `FlopCounterMode` does so too, but keeps account by module and tries to take every operator
    apart first, which takes twice the time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        names = (name for name in UNCOUNTED_ATTENTION if hasattr(torch.ops.aten, name))
        ours = {getattr(torch.ops.aten, name): _attention_flops for name in names}
        self._formulas: dict[Any, Callable[..., int]] = {**flop_registry, **ours}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        value = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=value)
        return value


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """FLOPs of fused attention: Q K^T, and the weights times V."""
    pairs = query[..., 0].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])
