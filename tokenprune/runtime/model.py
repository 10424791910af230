"""The model that `wrap` returns: the host's class, with a forward that prunes.

It shares the host's parameters, buffers and submodules. Only the forward is other: it runs one of
three paths, `mask` while training, `gather` in eval, `dense` on request.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from tokenprune.analysis.plan import Plan
from tokenprune.errors import HostError, KeepIndicesError, NotWrappedError, PlanError
from tokenprune.hosts.inputs import CallSignature, ExampleInputs, named_inputs
from tokenprune.hosts.spec import ArchSpec
from tokenprune.ops.jagged import in_order
from tokenprune.ops.selection import check_keep_indices
from tokenprune.recipe import Recipe
from tokenprune.reductions.bypass import BYPASSES
from tokenprune.rewrite.rewrite import PREDICTORS
from tokenprune.rewrite.stages import StageContext
from tokenprune.runtime.program import PATHS, Path, Programs, Route
from tokenprune.runtime.pruning_trace import PruningTrace, stage_traces
from tokenprune.tracing.host_graph import Traced, no_autocast_cache, trace_call
from tokenprune.tracing.state import Unset, buffers_kept, still_unset

ADDED = (PREDICTORS, BYPASSES)
OWN = (*ADDED, "_pruning", "forward")
# What belongs to one nn.Module object: its tables, and what compile, replicas and hooks keep there.
OF_THE_OBJECT = {*vars(nn.Module()), "_compiled_call_impl", "_former_parameters", "_is_replica"}

__all__ = ["ADDED", "PrunedModel", "pruned_class", "pruning_of", "trace_host"]


@dataclass
class Overrides:
    """What `using` forces."""

    path: Path | None = None
    keep_indices: tuple[Tensor, ...] | None = None
    generator: torch.Generator | None = None


@dataclass
class Pruning:
    """The pruning side of a wrapped model; everything that is not the host's."""

    host: nn.Module
    spec: ArchSpec
    recipe: Recipe
    plan: Plan
    call: CallSignature
    restore: bool | None
    """Whether outputs that hold tokens come back in place; None refuses such outputs."""
    watched: list[nn.Module]
    """Modules whose `training` flag the host's Python code may read."""
    blank: Unset
    """What `unset` found when the host was wrapped."""
    programs: dict[Any, Programs] = field(default_factory=dict)
    overrides: Overrides = field(default_factory=Overrides)

    def route(self, path: Path) -> Route:
        """The program of a path: where images keep different numbers of tokens, another one."""
        return "ragged" if path == "gather" and self.plan.threshold is not None else path

    def inputs(self, given: ExampleInputs | None) -> dict[str, Any]:
        """Example inputs by name; drawn if None."""
        return named_inputs(self.call, self.spec, self.host, given)


class PrunedModel(nn.Module):
    """Mixin in front of the host's class. Made by `wrap`, never by hand."""

    _pruning: Pruning

    def forward(self, *args: Any, return_trace: bool = False, **kwargs: Any) -> Any:
        """Run the host, pruned.

        Args:
            return_trace: Also return a `PruningTrace`.

        Returns:
            What the host returns; with `return_trace`, a pair of that and the trace.
        """
        if "_is_replica" in self.__dict__:
            raise HostError(
                "nn.DataParallel runs replicas of a model in threads, which a wrapped model is not "
                "made for. Use DistributedDataParallel, one process a device (torchrun)."
            )
        pruning = self._pruning
        path = pruning.overrides.path or ("mask" if self.training else "gather")
        forced = pruning.overrides.keep_indices is not None
        by_ratio = path == "gather" and not forced and pruning.plan.threshold is None
        keeps_all = by_ratio and min(pruning.plan.keep_ratios) == 1.0
        if (path == "dense" or keeps_all) and not return_trace:
            return pruning.host.forward(*args, **kwargs)
        arguments = pruning.call.named(args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            _prepare(self, path, tuple(arguments), *arguments.values())
        programs = self._programs(arguments)
        route = pruning.route(path)
        if route == "ragged" and torch.compiler.is_exporting():
            raise PlanError(
                "A model in which images keep different numbers of tokens cannot be exported: its "
                "shapes depend on what the images hold. Export it with fixed counts: "
                "model.set_threshold(None)."
            )
        program = programs.get(pruning.host, route)
        context = self._context(path, programs, arguments)
        tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor)}
        output, records, tokens, real = program.run(self, context, **tensors)
        if not return_trace:
            return output
        traces = stage_traces(route, records, programs)
        return output, PruningTrace(traces, tokens, real)

    @contextmanager
    def using(
        self,
        path: Path | None = None,
        keep_indices: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Self]:
        """Force how the model runs, inside a `with` block.

        Args:
            path: `"dense"`, `"mask"` or `"gather"`, whatever `training` says.
            keep_indices: The kept set of each stage: one [B, K] tensor of original patch numbers
                per stage, each image's later set inside its earlier one. In any order. With a
                threshold, -1 may stand where an image keeps fewer than others.
            generator: Source of the Gumbel noise, on the model's device.

        Raises:
            HostError: There is no such path.
            KeepIndicesError: The sets are out of range, repeated, not nested, or of a wrong shape.
        """
        if path is not None and path not in PATHS:
            raise HostError(f"There is no path {path!r}. Choose one of {', '.join(PATHS)}.")
        was = self._pruning.overrides
        forced = None
        if keep_indices is not None:
            forced = tuple(in_order(kept) for kept in _checked_sets(self._pruning, keep_indices))
            if self._pruning.plan.threshold is not None:
                forced = tuple(map(_trimmed, forced))
        self._pruning.overrides = Overrides(
            path or was.path, forced or was.keep_indices, generator or was.generator
        )
        try:
            yield self
        finally:
            self._pruning.overrides = was

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change how many tokens are kept; nothing is traced again.

        Args:
            keep_ratio: r for r, r^2, r^3, ... over the stages, or one ratio per stage, each of the
                original patch tokens. So in bypass mode too, where the published Swin models go
                down in steps instead: give `[r, r - 0.2, r - 0.4]` for those. With a threshold
            (`set_threshold`, `selection: threshold`) eval does not read the ratios; they stay what
            training aims at.

        Raises:
            PlanError: A ratio is out of (0, 1], they grow, or their number is wrong.
        """
        self._pruning.plan = self._pruning.plan.with_keep_ratio(keep_ratio)

    def set_threshold(self, threshold: float | None) -> None:
        """Choose tokens by their keep probability in eval; nothing is traced again.

        Each image then keeps what its predictor wants, at least one token, and easy images cost
        less than hard ones. Works for any recipe; `verify` afterwards checks this path too.

        Args:
            threshold: In (0, 1): tokens with a keep probability above it stay. None goes back to
                the same number of every image, as the keep ratios say.

        Raises:
            PlanError: It is no number between 0 and 1.
        """
        self._pruning.plan = self._pruning.plan.with_threshold(threshold)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a checkpoint of the host alone leaves the predictors as they are.

        The host's part is loaded by the host, which may have its own way with keys.
        """
        own = {key: value for key, value in state_dict.items() if key.startswith(ADDED)}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        homeless = [key for key in own if key.partition(".")[0] not in self._modules]
        if strict and homeless:
            mode = self._pruning.plan.mode
            raise RuntimeError(
                f"The weights hold {homeless[0]!r}, which a {type(self).__name__} wrapped in mode "
                f"{mode!r} does not have: they are of another mode. Wrap the host in that mode, or "
                "pass strict=False."
            )
        found = self._pruning.host.load_state_dict(rest, strict=strict, assign=assign)
        for name in ADDED if own else ():
            part = {k.removeprefix(f"{name}."): v for k, v in own.items() if k.startswith(name)}
            if name in self._modules:
                result = getattr(self, name).load_state_dict(part, strict=strict, assign=assign)
                found.missing_keys.extend(f"{name}.{key}" for key in result.missing_keys)
                found.unexpected_keys.extend(f"{name}.{key}" for key in result.unexpected_keys)
            else:
                found.unexpected_keys.extend(f"{name}.{key}" for key in part)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__
        shared = "_pruning" in state and "_is_replica" not in state and _is_of_the_host(name)
        before = state.get(name, ...) if shared else ...
        super().__setattr__(name, value)
        if shared:
            setattr(self._pruning.host, name, value)  # a new head, or a mode, is the host's too
            if name != "training" and name in self.__dict__ and not _same(before, value):
                self._pruning.programs.clear()  # its code may have decided by it

    def _get_name(self) -> str:
        return f"TokenPruned[{type(self).__name__}]"

    def _programs(self, arguments: Mapping[str, Any], traced: Traced | None = None) -> Programs:
        """The programs for a call of this signature; traced if there are none yet.

        Args:
            traced: The trace of this very call, if there is one.
        """
        pruning = self._pruning
        key, batch_size = self._signature(arguments)
        found = pruning.programs.get(key)
        if found is not None and found.axes.batch_bound and found.batch_size != batch_size:
            key = (key, batch_size)
            found = pruning.programs.get(key)
        if found is None:
            found = self._analyse(arguments, traced)
            pruning.programs[key] = found
        return found

    def _signature(self, arguments: Mapping[str, Any]) -> tuple[Any, int]:
        """Everything a decision of the host's Python code may depend on, and the batch size."""
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if not tensors:
            raise HostError("A wrapped model must be called with at least one tensor.")
        batch_size = tensors[0].shape[0] if tensors[0].ndim else 1
        device = tensors[0].device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        modes = tuple([module.training for module in self._pruning.watched])
        key = [modes, autocast, torch.get_autocast_dtype(device) if autocast else None]
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                shape = tuple(value.shape)
                batched = bool(shape) and shape[0] == batch_size
                value = (batched, shape[1:] if batched else shape, value.dtype, value.device)
            elif not isinstance(value, bool | int | float | str):
                raise HostError(
                    f"Argument {name!r} is a {type(value).__name__}; a wrapped model takes "
                    "tensors, numbers, strings and flags."
                )
            key.append((name, value))
        return tuple(key), batch_size

    def _analyse(self, arguments: Mapping[str, Any], traced: Traced | None) -> Programs:
        pruning = self._pruning
        final = pruning.spec.norm or pruning.spec.blocks[-1]
        if traced is None:
            with still_unset(pruning.blank):
                traced = trace_host(pruning.host, pruning.spec, arguments)
        with no_autocast_cache(), buffers_kept(pruning.host):
            return Programs.analyse(
                pruning.host,
                traced.at(pruning.plan.blocks),
                pruning.plan,
                final,
                pruning.restore,
                pruning.spec.padding_mask,
            )

    def _context(
        self, path: Path, programs: Programs, arguments: Mapping[str, Any]
    ) -> StageContext:
        pruning = self._pruning
        overrides, sampling = pruning.overrides, pruning.recipe.sampling
        num_patches = programs.num_patches
        if overrides.keep_indices is not None:
            batch_size = next(v for v in arguments.values() if isinstance(v, Tensor)).shape[0]
            for kept, patches in zip(overrides.keep_indices, num_patches, strict=True):
                check_keep_indices(
                    kept,
                    batch_size=batch_size,
                    num_patches=patches,
                    padded=pruning.plan.threshold is not None,
                )
        return StageContext(
            num_keep=pruning.plan.counts(num_patches),
            sample=path == "mask" and self.training,
            threshold=pruning.plan.threshold,
            buckets=pruning.plan.buckets,
            temperature=sampling.temperature,
            hard=sampling.hard,
            keep_indices=overrides.keep_indices,
            generator=overrides.generator,
        )


def _is_of_the_host(name: str) -> bool:
    if name == "training":
        return True
    return not (name.startswith((*OWN, "__")) or name in OF_THE_OBJECT)


def _same(before: Any, after: Any) -> bool:
    plain = (bool, int, float, str, type(None), tuple)
    return before is after or (type(before) is type(after) in plain and before == after)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(model: PrunedModel, path: Path, names: tuple[str, ...], *values: Any) -> bool:
    """Trace and rewrite while torch.compile looks on, so that it finds a program and reads on.

    It runs when the call is compiled, on real tensors, and is no part of what is compiled.
    """
    model._programs(dict(zip(names, values, strict=True))).get(model._pruning.host, path)
    return True


def trace_host(host: nn.Module, spec: ArchSpec, arguments: Mapping[str, Any]) -> Traced:
    """Trace one call of a host, without stages.

    Raises:
        HostError: The host itself refuses these arguments.
        TraceError: Its code cannot be traced; the line of its source is named.
    """
    with no_autocast_cache(), buffers_kept(host):
        return trace_call(
            host, host.forward, arguments, spec.blocks, token_argument=spec.token_argument
        )


def _checked_sets(pruning: Pruning, sets: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(sets) != len(pruning.plan.blocks):
        raise KeepIndicesError(
            f"Got keep_indices for {len(sets)} stages; the plan has {len(pruning.plan.blocks)}, "
            f"before blocks {list(pruning.plan.blocks)}. Give one [B, K] tensor per stage."
        )
    wrong = [kept for kept in sets if not isinstance(kept, Tensor) or kept.ndim != 2]
    if wrong:
        found = f"shape {tuple(wrong[0].shape)}" if isinstance(wrong[0], Tensor) else wrong[0]
        raise KeepIndicesError(
            f"keep_indices must be [B, K] tensors of whole numbers, one per stage; found {found!r}."
        )
    if pruning.plan.mode == "bypass":
        return sets
    for stage, (before, after) in enumerate(pairwise(sets), start=1):
        for image, (wide, narrow) in enumerate(zip(before.tolist(), after.tolist(), strict=False)):
            lost = sorted(set(narrow) - set(wide) - {-1})
            if lost:
                raise KeepIndicesError(
                    f"keep_indices of stage {stage} keep patches {lost[:5]} of image {image}, "
                    f"which stage {stage - 1} dropped. Each stage's set must lie in that of the "
                    "stage before."
                )
    return sets


def _trimmed(kept: Tensor) -> Tensor:
    """A set [B, K] in order without the columns that say -1 for every image."""
    longest = int((kept >= 0).sum(1).max()) if kept.numel() else 0
    return kept[:, : max(longest, 1)]


@cache
def pruned_class(host_class: type[nn.Module]) -> type[PrunedModel]:
    """The class of wrapped models of `host_class`: its name, its methods, our forward."""
    signature = inspect.signature(host_class.forward)
    extra = inspect.Parameter("return_trace", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    def forward(self: PrunedModel, *args: Any, **kwargs: Any) -> Any:
        return PrunedModel.forward(self, *args, **kwargs)

    forward.__doc__ = host_class.forward.__doc__
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], extra, *parameters[at:]]
    )
    names = {"__module__": host_class.__module__, "__doc__": host_class.__doc__, "forward": forward}
    return type(host_class.__name__, (PrunedModel, host_class), names)


def pruning_of(model: nn.Module) -> Pruning:
    """The pruning side of a wrapped model.

    Raises:
        NotWrappedError: `model` was not returned by `wrap`.
    """
    if not isinstance(model, PrunedModel):
        raise NotWrappedError(
            f"A model that tokenprune.wrap returned is needed, found {type(model).__name__}. Call "
            "tokenprune.wrap(model, recipe) first."
        )
    return model._pruning
