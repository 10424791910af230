"""Count the multiply-accumulates of a graph, node by node, on meta tensors, which are shapes."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import flop_registry

from tokenprune.analysis.analysis import Analysis
from tokenprune.cost.remembered import Remembered
from tokenprune.private import TorchDispatchMode, tree_map
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.tracing.hooks import calls_unhooked
from tokenprune.tracing.interpret import evaluate, run
from tokenprune.tracing.stand_ins import stand_ins
from tokenprune.tracing.state import buffers_kept

__all__ = ["Counted", "count_macs"]

# Fused attention operators that torch's counter does not know (2.14).
UNCOUNTED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)


META = torch.device("meta")


class Counted(NamedTuple):
    """What one run cost."""

    macs: Counter[tuple[str, int]]  # by ("block", number), ("predictor", stage) or ("other", 0)
    tokens: dict[int, int]  # patch tokens that enter each block


def count_macs(
    model: nn.Module,
    analysis: Analysis,
    graph: fx.Graph,
    entries: Mapping[int, fx.Node],
    inputs: Mapping[str, Any],
    remembered: Remembered | None = None,
) -> Counted:
    """Count one run of a graph, which was made from the trace of `analysis`; `inputs` are meta
    tensors, and `entries` says which of its nodes holds what enters a block."""
    return _Count(model, analysis, entries).over(graph, inputs, remembered or Remembered())


class _Count:
    """Runs a graph on meta tensors and books each node's MACs."""

    def __init__(
        self, model: nn.Module, analysis: Analysis, entries: Mapping[int, fx.Node]
    ) -> None:
        self.model, self.analysis = model, analysis
        self.counted = Counted(Counter(), {})
        self._blocks: dict[str, list[int]] = {}
        for number, block in analysis.blocks.items():
            self._blocks.setdefault(block.path, []).append(number)
        self._entered: dict[fx.Node, list[int]] = {}
        for number, entry in entries.items():
            self._entered.setdefault(entry, []).append(number)

    def over(self, graph: fx.Graph, inputs: Mapping[str, Any], remembered: Remembered) -> Counted:
        """Count one run of `graph`."""
        counter = _FlopCounter()

        def step(node: fx.Node, env: Any) -> Any:
            def compute() -> tuple[Any, int]:
                before = counter.total
                value = evaluate(self.model, node, env, shapes_alone=True)
                return value, counter.total - before

            value, flops = remembered.value(node, env, compute)
            if flops:
                self.counted.macs[self._account(node)] += flops // 2
            return value

        mode = self.analysis.traced.fake_mode
        kept = buffers_kept(self.model)
        whole = torch.inference_mode(False)  # there a mode sees linear layers, and no product
        stood = stand_ins(self.model, mode)
        with whole, stood, kept, torch.no_grad(), calls_unhooked(), counter:
            for node, value in run(self.model, graph, inputs, step):
                for block in self._entered.get(node, ()):
                    self.counted.tokens[block] = self._patch_tokens(block, value)
        return self.counted

    def _account(self, node: fx.Node) -> tuple[str, int]:
        for used in node.all_input_nodes:
            first, _, rest = str(used.target).partition(".")
            if used.op == "get_attr" and first == PREDICTORS:
                return "predictor", int(rest.partition(".")[0])
        path = node.meta["where"].module
        while path:
            if calls := self._blocks.get(path):  # several, if the host calls one module repeatedly
                entered = (block for block in calls if block in self.counted.tokens)
                return "block", max(entered, default=calls[0])
            path = path.rpartition(".")[0]
        return "other", 0

    def _patch_tokens(self, block: int, value: Tensor) -> int:
        """Of one image, in the tensor that enters a block; all grids of a host have one layout."""
        if value.ndim == 3:
            return int(value.shape[1]) - self.analysis.plan.num_prefix
        first = value.ndim == 4 and any(g.layout.channels_first for g in self.analysis.grids)
        traced = self.analysis.blocks[block].entry.meta["val"]
        images = value.shape[0] * self.analysis.traced.batch_size // traced.shape[0]
        return int(value.numel() // images // value.shape[1 if first else -1])


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of what runs, by torch's own formulas, and runs it on meta tensors: a shape
    that is new takes fake tensors ten times as long.

    `FlopCounterMode` adds up too, but keeps account by module and tries to take every operator
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
        args, kwargs = tree_map(_meta, (args, dict(kwargs or {})))
        value = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=value)
        return value


def _meta(value: Any) -> Any:
    """A meta tensor for one of a weight, and that device for any other."""
    if isinstance(value, torch.device):
        return META
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    if value.layout is not torch.strided:
        return torch.empty(tuple(value.shape), dtype=value.dtype, device=META)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """FLOPs of fused attention: Q K^T, and the weights times V."""
    pairs = query[..., 0].numel() * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])
