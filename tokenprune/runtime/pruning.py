"""The pruning side of a wrapped model: everything that is not the host's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenprune.analysis.analysis import analyse
from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.plan import Budget, Plan, bind
from tokenprune.analysis.reading import Reading, prefix_at, settle
from tokenprune.errors import HostError, PlanError
from tokenprune.hosts.inputs import (
    CallSignature,
    ExampleInputs,
    first_floating,
    named_inputs,
    zeros_of,
)
from tokenprune.hosts.registry import hints, stated_by
from tokenprune.hosts.spec import ArchSpec, ExampleInput
from tokenprune.ops.kept_sets import check_keep_indices
from tokenprune.private import exporting, without_modes
from tokenprune.recipe import Recipe
from tokenprune.reductions.choice import Choice, choice_of
from tokenprune.rewrite.kept.pruning_trace import PruningTrace
from tokenprune.rewrite.settings import PATHS, CallSettings, Path, PathName
from tokenprune.runtime.added import check_parts, check_place
from tokenprune.runtime.cache import ProgramCache, Signature, signature_of
from tokenprune.runtime.children import Children
from tokenprune.runtime.compiled import (
    HANDS_ON,
    Handle,
    Seen,
    prepare,
    refuse_jit_trace,
    watched_by_dynamo,
)
from tokenprune.runtime.fitted import warn_if_fresh
from tokenprune.runtime.hooked import HooksOfCall
from tokenprune.runtime.overrides import NOTHING, OfThreads, Overrides, forced_sets
from tokenprune.runtime.program import Programs
from tokenprune.runtime.steps import prove_steps
from tokenprune.runtime.watch import Watch
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.tracing.arguments import Arguments, as_arguments
from tokenprune.tracing.as_needed import trace_call
from tokenprune.tracing.closed import refuse_closed
from tokenprune.tracing.hook_nodes import hooks_told
from tokenprune.tracing.host_graph import HostGraph, explained
from tokenprune.tracing.stand_ins import forget_weights, stand_ins
from tokenprune.tracing.state import buffers_kept, no_autocast_cache
from tokenprune.tracing.tracer import ONE_AT_A_TIME

__all__ = ["Pruning"]


@dataclass
class Pruning:
    """What a wrapped model prunes with, and its programs.

    Attributes:
        host: The dense model.
        adapter: Which adapter was asked for.
        reading: Where the facts were found that it left open.
        spec: What it says of the host.
        recipe: With its stages.
        plan: Where the stages are; of the newest trace, each `Programs` has its own.
        budget: How much they keep; `set_keep_ratio` and `set_threshold` replace it.
        call: The arguments of the host's forward.
        restore: Whether outputs that hold tokens come back in place; None refuses such outputs.
        handed: By method, the arguments whose contents no trace knows (`Arguments.handing`).
        overrides: What `using` forces, by thread.
        entries: The host's other methods that are known to run its blocks.
        proven_hooks: Hooks of smaller numbers were there when it was wrapped or verified.
        example: What it was wrapped with; tensors are on the meta device.
        asked: What the host said by then that it takes.
        added: What `wrap` added, by name: children of the wrapped model alone.
        compiled: What `compile()` has set on the wrapped model.
        fitted: The scorers are known to have learned, or to have nothing to learn.
    """

    host: nn.Module
    adapter: str | ArchSpec | None
    reading: Reading
    spec: ArchSpec
    recipe: Recipe
    method: Choice
    plan: Plan
    budget: Budget
    call: CallSignature
    restore: bool | None
    example: Arguments
    asked: Mapping[str, ExampleInput] = field(default_factory=dict)
    added: dict[str, nn.Module] = field(default_factory=dict)
    compiled: Any = None
    cache: ProgramCache = field(default_factory=ProgramCache)
    handed: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    overrides: OfThreads = field(default_factory=OfThreads)
    entries: set[str] = field(default_factory=set)
    proven_hooks: int = field(default_factory=lambda: RemovableHandle.next_id)
    watch: Watch = field(default_factory=Watch)
    fitted: bool = False

    def __post_init__(self) -> None:
        self.handle, self.seen, self.spare = Handle(self), Seen(), Seen()
        self.children = Children(self.host, self.added)

    def inputs(self, given: ExampleInputs | None) -> Arguments:
        """The arguments of an example call; drawn if None, for the host as it is now."""
        spec = hints(self.host, self.adapter) if given is None else self.spec
        return self.handing(named_inputs(self.call, spec, self.host, given, self.as_wrapped))

    def handing(self, arguments: Arguments, entry: str = "forward") -> Arguments:
        """The arguments of a call as its trace takes them."""
        return arguments.handing(self.handed.get(entry, ()))

    def hands_on(self, args: Sequence[Any], kwargs: Mapping[str, Any], entry: str) -> bool:
        """Whether a call has an argument whose contents no trace knows."""
        known, given = self.handed.get(entry, ()), self.call.names[: len(args)]
        return any(kwargs.get(str(p)) is not None or p in given for p in known)

    def as_wrapped(self) -> Arguments:
        """Arguments like those it was wrapped with, of zeros, of the host's size and place now."""
        asks = hints(self.host, self.adapter).inputs
        other = {name: asked.shape for name, asked in asks.items() if asked != self.asked.get(name)}
        return zeros_of(self.example, other, first_floating(self.host))

    @property
    def forced(self) -> Overrides:
        """What `using` forces in this thread."""
        if not self.overrides:
            return NOTHING
        if not torch.compiler.is_dynamo_compiling():
            return self.overrides.get(get_ident(), NOTHING)
        if len(self.overrides) > 1:  # a compiler cannot see which thread runs
            raise HostError(
                "A compiled model was called while several threads are inside of `using`. Compile "
                "and call it in one thread, or give each thread a copy.deepcopy of the model."
            )
        return next(iter(self.overrides.values()))

    def path(self, training: bool) -> Path:
        """What a call runs."""
        return self.forced.path or self.method.path(training)

    def runs_host(self, path: Path) -> bool:
        """Whether a path is the host itself: nothing is pruned."""
        keeps_all = self.forced.keep_indices is None and self.budget.keeps_all
        keeps_all = keeps_all and self.method.reduction.prunes
        return path == "dense" or (path == "gather" and keeps_all)

    def follow_mode(self) -> None:
        """Bring what was added into the mode of the host, which may be set by itself."""
        for module in self.added.values():
            if module.training != self.host.training:
                module.train(self.host.training)

    def look_at_scorers(self, path: Path) -> None:
        """Warn, at an eval call that they prune, if the scorers have learned nothing yet."""
        if self.fitted or self.host.training or self.runs_host(path) or self.forced.keep_indices:
            return
        kind = type(self.host).__name__
        self.fitted = warn_if_fresh(kind, self.added, self.method.reduction.removes)

    def run(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        return_trace: bool,
        entry: str = "forward",
    ) -> Any:
        """One call of the wrapped model, or of another method of the host (`entry`).

        Raises:
            HostError: torch.jit.trace runs, which would freeze this call's program.
        """
        path = self.path(model.training)
        if self.runs_host(path) and not return_trace:
            return getattr(self.host, entry)(*args, **kwargs)
        refuse_jit_trace(type(self.host).__name__)
        if torch.compiler.is_dynamo_compiling():
            if self.hands_on(args, kwargs, entry):
                torch._dynamo.graph_break(msg=HANDS_ON)
                return self.run_alone(model, args, kwargs, return_trace, entry)
            call = self.call if entry == "forward" else CallSignature.of(type(self.host), entry)
            arguments = call.bind(args, kwargs)
            leaves = arguments.leaves
            given = arguments.places, tuple(leaves), *leaves.values()
            number = prepare(self.handle, path, entry, *given)
            if not exporting():
                watched_by_dynamo(self)
            if isinstance(number, str):  # refused: outside of Dynamo, which would wrap the error
                torch._dynamo.graph_break(msg=number)
                return self.run_alone(model, args, kwargs, return_trace, entry)
            signature = signature_of(arguments, entry, self.host.training)
            programs = self.cache.numbered(number, signature)
        else:
            if model.__dict__ is not self.host.__dict__:
                raise HostError(
                    f"The __dict__ of {type(self.host).__name__} was replaced by another one. "
                    "Update it in place, or wrap the host again."
                )
            self.look_at_scorers(path)
            call = CallSignature.now(type(self.host), entry)
            arguments = call.bind(args, kwargs, self.handed.get(entry, ()))
            programs = self.programs(arguments, entry)
            arguments = self.handing(arguments, entry)
            self.prove(programs, arguments)
        name = self.path_name(path)
        if name == "jagged" and exporting():
            raise PlanError(
                "A model in which images keep different numbers of tokens cannot be exported: its "
                "shapes depend on what the images hold. Export it with fixed counts: "
                "model.set_threshold(None)."
            )
        program = programs.get(self.host, name, whole=return_trace)
        settings = self.settings(path, programs, arguments, model.training)
        hooked = program.hooked and not torch.compiler.is_compiling() and not self.cache.frozen
        hooks = HooksOfCall(self.host, programs, self.proven_hooks)
        with hooks_told(hooks) if hooked else nullcontext():
            output, records, tokens, real = program.run(model, settings, **arguments.inputs)
        if hooked:
            hooks.done()
        programs.look_after()
        if settings.sample and not torch.compiler.is_compiling():
            scorers, decisions = model.get_submodule(PREDICTORS), [kept for _, kept in records]
            targets = self.budget.keep_ratios
            self.watch.saw(model, scorers, decisions, real, targets, return_trace)
        if not return_trace:
            return output
        if not records:
            return output, PruningTrace([], tokens, real)
        kept = self.method.reduction.kept_sets[name]
        stages = kept.stage_traces(records, programs.num_patches, programs.starts)
        return output, PruningTrace(stages, tokens, real)

    run_alone = torch.compiler.disable(run)  # type: ignore[no-untyped-call]

    def path_name(self, path: Path) -> PathName:
        """The gather path has another name where images keep different numbers of tokens."""
        return "jagged" if path == "gather" and self.budget.threshold is not None else path

    def programs(
        self,
        given: Arguments | Mapping[str, Any],
        entry: str = "forward",
        traced: HostGraph | None = None,
        blocks: Blocks | None = None,
    ) -> Programs:
        """The programs for a call of this signature; made if there are none yet, of `traced` and
        `blocks` if this very call was traced already.

        Raises:
            PlanError: A stage sees no patch tokens, or can do nothing.
            UnsupportedHostError: The call cannot be traced, or a node run with fewer tokens.
        """
        host, arguments = self.host, as_arguments(self.call.host, given)
        self.follow_mode()
        if not self.cache.frozen:  # the host may be cast by itself
            check_place(host, self.added)
        arguments = self.handing(arguments, entry)
        signature = signature_of(arguments, entry, host.training)
        found = self.cache.find(signature, host, arguments)
        if found is None:
            with ONE_AT_A_TIME, explained(host):  # another thread may be making the same
                found = self.cache.find(signature, host, arguments)
                found = found or self._made(signature, arguments, entry, traced, blocks)
        if not signature.batch_size and found.analysis.batch_bound:
            raise HostError(
                f"{type(host).__name__} was called with an empty batch, but its Python code "
                "depends on the number of images. Call it with one image at least."
            )
        return found

    def _made(
        self,
        signature: Signature,
        arguments: Arguments,
        entry: str,
        traced: HostGraph | None,
        blocks: Blocks | None,
    ) -> Programs:
        """New programs of a call."""
        host = self.host
        if traced is None or blocks is None:
            refuse_closed(host)
            known = hints(host, self.adapter)  # it may have other blocks, or tokens, now
            if not signature.batch_size:
                arguments = arguments.with_images()
            traced, arguments = trace_call(host, arguments, entry, stated=stated_by(host, known))
            handed = dict.fromkeys([*self.handed.get(entry, ()), *arguments.handed_places])
            self.handed[entry] = tuple(handed)  # Dynamo of torch 2.8 guards no sets
            signature = signature_of(arguments, entry, host.training)
            spec, blocks = settle(host, traced, known, self.reading)
            if self.method.reduction.removes:
                spec = prefix_at(host, traced, spec, blocks, self.reading, self.plan.blocks)
            self.spec = spec
            choice_of(self.recipe, self.spec)  # it may keep a grid now
            self.plan, _ = bind(self.recipe, self.spec)
        plain, unseen = stand_ins(host, traced.fake_mode), without_modes()
        with unseen, plain, no_autocast_cache(), buffers_kept(host):
            kind, others = self.method.reduction, [programs.analysis for programs in self.cache]
            given = (host, traced, blocks, self.plan, self.spec, kind.removes, self.restore)
            reduction = kind(host, analyse(*given, known=others))
        check_parts(host, self.added, reduction)
        forget_weights(traced.fake_mode)
        earlier = (p.proven for p in self.cache if p.analysis is reduction.analysis.repeats)
        how = (self.method.scorer, self.restore, self.recipe.unread_rows)
        proven = self.cache.proven_next or any(earlier)
        found = Programs(reduction.analysis, reduction, *how, proven)
        self.cache.add(signature, found)
        return found

    def prove(self, programs: Programs, arguments: Arguments) -> None:
        """See `prove_steps`; of programs that nobody has proven."""
        if not programs.proven:
            with explained(self.host):
                prove_steps(self.host, self.added, programs, arguments)

    def settings(
        self, path: Path, programs: Programs, arguments: Arguments, training: bool
    ) -> CallSettings:
        """What one call asks for.

        Raises:
            KeepIndicesError: Forced sets do not fit these arguments.
            PlanError: A stage is to keep fewer tokens than always stay.
        """
        sampling, forced = self.recipe.sampling, self.forced.keep_indices
        if forced is not None:
            padded = self.budget.threshold is not None
            batch = next(iter(arguments.tensors.values())).shape[0]
            for kept, patches in zip(forced, programs.num_patches, strict=True):
                check_keep_indices(kept, batch_size=batch, num_patches=patches, padded=padded)
        return CallSettings(
            num_keep=self.budget.counts(programs.num_patches, self.plan.num_suffix),
            sample=path == "mask" and training and self.method.scorer.probabilistic,
            threshold=self.budget.threshold,
            temperature=sampling.temperature,
            hard=sampling.hard,
            fixed=sampling.counts == "fixed" and self.budget.threshold is None,
            spread=sampling.noise == "spread",
            keep_indices=forced,
            generator=self.forced.generator,
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
        reduction = self.method.reduction
        there = [p for p in PATHS if p == "dense" or p in reduction.kept_sets]
        if path is not None and path not in there:
            raise HostError(
                f"`mode: {reduction.name}` has no {path} path: it trains on the path that eval "
                f"runs. Choose one of {', '.join(there)}."
            )
        was, forced, thread = self.forced, None, get_ident()
        if keep_indices is not None:
            self.method.check_keep_indices()
            known = next(iter(self.cache), None) or self.programs(self.as_wrapped())
            padded = self.budget.threshold is not None
            forced = forced_sets(keep_indices, self.plan.blocks, known.starts, padded)
        self.overrides[thread] = Overrides(
            path or was.path, forced or was.keep_indices, generator or was.generator
        )
        try:
            yield
        finally:
            self.overrides[thread] = was
            if was is NOTHING:
                del self.overrides[thread]

    def become(self, other: "Pruning") -> None:
        """Prune the host as another one does; what is compiled, forced or frozen stays."""
        other.cache.limit, other.cache.frozen = self.cache.limit, self.cache.frozen
        own = {name: getattr(self, name) for name in ("handle", "compiled", "overrides")}
        self.__dict__.update({**vars(other), **own})

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """See `PrunedModel.set_keep_ratio`."""
        self.method.check_prunes(f"keep_ratio={keep_ratio!r}")
        self.budget = self.budget.with_keep_ratio(keep_ratio, self.plan)

    def set_threshold(self, threshold: float | None) -> None:
        """See `PrunedModel.set_threshold`."""
        budget = self.budget.with_threshold(threshold)
        self.method.check_threshold(threshold)
        self.budget = budget
