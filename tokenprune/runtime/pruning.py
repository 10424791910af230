"""The pruning side of a wrapped model: everything that is not the host's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_constant

from tokenprune.analysis.analysis import analyse
from tokenprune.analysis.blocks import Blocks, find_blocks
from tokenprune.analysis.plan import Budget, Plan
from tokenprune.errors import HostError, KeepIndicesError, PlanError
from tokenprune.hosts.inputs import CallSignature, ExampleInputs, named_inputs
from tokenprune.hosts.spec import ArchSpec
from tokenprune.methods import Method
from tokenprune.ops.kept_sets import check_keep_indices
from tokenprune.ops.selection import in_order
from tokenprune.recipe import Recipe
from tokenprune.reductions import MODES
from tokenprune.rewrite.kept import KEPT_SETS
from tokenprune.rewrite.kept.pruning_trace import PruningTrace
from tokenprune.rewrite.settings import PATHS, CallSettings, Path, PathName
from tokenprune.runtime.cache import ProgramCache, signature_of
from tokenprune.runtime.program import Programs
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.tracing.host_graph import HostGraph, trace
from tokenprune.tracing.state import (
    LazyAttributes,
    buffers_kept,
    hide_lazy_tensors,
    no_autocast_cache,
)

__all__ = ["Overrides", "Pruning", "added_names"]


def added_names() -> tuple[str, ...]:
    """First parts of the state-dict keys that `wrap` may add to a host's."""
    added = dict.fromkeys(name for reduction in MODES.values() for name in reduction.added)
    return (PREDICTORS, *added)


@dataclass
class Overrides:
    """What `using` forces."""

    path: Path | None = None
    keep_indices: tuple[Tensor, ...] | None = None
    generator: torch.Generator | None = None


class Handle:
    """A `Pruning` as an argument that Dynamo takes for a constant (torch 2.11 and earlier take no
    other objects); the same one only if it is the same object."""

    def __init__(self, pruning: "Pruning") -> None:
        self.pruning = pruning

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


register_constant(Handle)


@dataclass
class Pruning:
    """What a wrapped model prunes with, and its programs.

    Attributes:
        host: The dense model.
        spec: What its adapter says.
        recipe: With its stages.
        plan: Where the stages are; never changes.
        budget: How much they keep; `set_keep_ratio` and `set_threshold` replace it.
        call: The arguments of the host's forward.
        restore: Whether outputs that hold tokens come back in place; None refuses such outputs.
        watched: Modules whose `training` flag the host's Python code may read.
        lazy: Attributes of the host that were None when it was wrapped.
    """

    host: nn.Module
    spec: ArchSpec
    recipe: Recipe
    method: Method
    plan: Plan
    budget: Budget
    call: CallSignature
    restore: bool | None
    watched: list[nn.Module]
    lazy: LazyAttributes
    cache: ProgramCache = field(default_factory=ProgramCache)
    overrides: Overrides = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        self.handle = Handle(self)

    def inputs(self, given: ExampleInputs | None) -> dict[str, Any]:
        """Example inputs by name; drawn if None."""
        return named_inputs(self.call, self.spec, self.host, given)

    def run(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], return_trace: bool
    ) -> Any:
        """One call of the wrapped model."""
        path = self.overrides.path or self.method.path(model.training)
        forced = self.overrides.keep_indices is not None
        keeps_all = path == "gather" and not forced and self.budget.keeps_all
        if (path == "dense" or keeps_all) and not return_trace:
            return self.host.forward(*args, **kwargs)
        arguments = self.call.named(args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            _prepare(self.handle, path, tuple(arguments), *arguments.values())
        programs = self.programs(arguments)
        name = self.path_name(path)
        if name == "jagged" and torch.compiler.is_exporting():
            raise PlanError(
                "A model in which images keep different numbers of tokens cannot be exported: its "
                "shapes depend on what the images hold. Export it with fixed counts: "
                "model.set_threshold(None)."
            )
        program = programs.get(self.host, name)
        settings = self.settings(path, programs, arguments, model.training)
        tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
        output, records, tokens, real = program.run(model, settings, **tensors)
        if not return_trace:
            return output
        if name == "dense":
            return output, PruningTrace([], tokens, real)
        nested = self.method.reduction.nested
        stages = KEPT_SETS[name].stage_traces(records, programs.num_patches, nested)
        return output, PruningTrace(stages, tokens, real)

    def path_name(self, path: Path) -> PathName:
        """The gather path has another name where images keep different numbers of tokens."""
        return "jagged" if path == "gather" and self.budget.threshold is not None else path

    def programs(
        self,
        arguments: Mapping[str, Any],
        traced: HostGraph | None = None,
        blocks: Blocks | None = None,
    ) -> Programs:
        """The programs for a call of this signature; made if there are none yet, of `traced` and
        `blocks` if this very call was traced already.

        Raises:
            PlanError: A stage sees no patch tokens, or can do nothing.
            UnsupportedHostError: The call cannot be traced, or a node run with fewer tokens.
        """
        signature, host = signature_of(arguments, self.watched), self.host
        found = self.cache.find(signature)
        if found is None:
            if traced is None or blocks is None:
                with hide_lazy_tensors(self.lazy):
                    traced = trace(host, arguments)
                blocks = find_blocks(host, traced, self.spec)
            leave = self.method.reduction.removes
            with no_autocast_cache(), buffers_kept(host):
                known = analyse(host, traced, blocks, self.plan, self.spec, tokens_leave=leave)
                reduction = self.method.reduction(host, known)
            found = Programs(known, reduction, self.method.scorer, self.restore)
            self.cache.add(signature, found)
        return found

    def settings(
        self, path: Path, programs: Programs, arguments: Mapping[str, Any], training: bool
    ) -> CallSettings:
        """What one call asks for.

        Raises:
            KeepIndicesError: Forced sets do not fit these arguments.
        """
        sampling, forced = self.recipe.sampling, self.overrides.keep_indices
        if forced is not None:
            padded = self.budget.threshold is not None
            batch = next(v for v in arguments.values() if isinstance(v, Tensor)).shape[0]
            for kept, patches in zip(forced, programs.num_patches, strict=True):
                check_keep_indices(kept, batch_size=batch, num_patches=patches, padded=padded)
        return CallSettings(
            num_keep=self.budget.counts(programs.num_patches),
            sample=path == "mask" and training and self.method.scorer.probabilistic,
            threshold=self.budget.threshold,
            buckets=self.budget.buckets,
            temperature=sampling.temperature,
            hard=sampling.hard,
            keep_indices=forced,
            generator=self.overrides.generator,
        )

    @contextmanager
    def using(
        self,
        path: Path | None,
        keep_indices: Sequence[Tensor] | None,
        generator: torch.Generator | None,
    ) -> Iterator[None]:
        """See `PrunedModel.using`."""
        if path is not None and path not in PATHS:
            raise HostError(f"There is no path {path!r}. Choose one of {', '.join(PATHS)}.")
        was, forced = self.overrides, None
        if keep_indices is not None:
            self._check_sets(keep_indices)
            forced = tuple(map(in_order, keep_indices))
            if self.budget.threshold is not None:
                forced = tuple(map(_trimmed, forced))
        self.overrides = Overrides(
            path or was.path, forced or was.keep_indices, generator or was.generator
        )
        try:
            yield
        finally:
            self.overrides = was

    def _check_sets(self, sets: Sequence[Tensor]) -> None:
        blocks = list(self.plan.blocks)
        if len(sets) != len(blocks):
            raise KeepIndicesError(
                f"Got keep_indices for {len(sets)} stages; the plan has {len(blocks)}, "
                f"at blocks {blocks}. Give one [B, K] tensor per stage."
            )
        wrong = [kept for kept in sets if not isinstance(kept, Tensor) or kept.ndim != 2]
        if wrong:
            found = f"shape {tuple(wrong[0].shape)}" if isinstance(wrong[0], Tensor) else wrong[0]
            raise KeepIndicesError(
                "keep_indices must be [B, K] tensors of whole numbers, one per stage; found "
                f"{found!r}."
            )
        if self.method.reduction.nested:
            _check_nested(sets)

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """See `PrunedModel.set_keep_ratio`."""
        self.budget = self.budget.with_keep_ratio(keep_ratio, self.plan)

    def set_threshold(self, threshold: float | None) -> None:
        """See `PrunedModel.set_threshold`."""
        budget = self.budget.with_threshold(threshold)
        self.method.check_threshold(threshold)
        self.budget = budget


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(handle: Handle, path: Path, names: tuple[str, ...], *values: Any) -> bool:
    """Build the program before Dynamo traces the call, on real tensors and outside of what is
    compiled."""
    pruning = handle.pruning
    programs = pruning.programs(dict(zip(names, values, strict=True)))
    programs.get(pruning.host, path)
    return True


def _check_nested(sets: Sequence[Tensor]) -> None:
    for stage, (before, after) in enumerate(pairwise(sets), start=1):
        for image, (wide, narrow) in enumerate(zip(before.tolist(), after.tolist(), strict=False)):
            lost = sorted(set(narrow) - set(wide) - {-1})
            if lost:
                raise KeepIndicesError(
                    f"keep_indices of stage {stage} keep patches {lost[:5]} of image {image}, "
                    f"which stage {stage - 1} dropped. Each stage's set must lie in the set of the "
                    "stage before."
                )


def _trimmed(kept: Tensor) -> Tensor:
    """A set [B, K] in order without the columns that say -1 for every image."""
    longest = int((kept >= 0).sum(1).max()) if kept.numel() else 0
    return kept[:, : max(longest, 1)]
