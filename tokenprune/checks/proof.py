"""One run of the theorems of docs/theorems.md on one model and one input."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tokenprune.checks.certificate import Check
from tokenprune.checks.trainable import requiring_grad
from tokenprune.errors import VerificationError
from tokenprune.hosts.inputs import first_floating
from tokenprune.ops.jagged import blank_padding, filled
from tokenprune.ops.moving import gather_aligned
from tokenprune.ops.selection import in_order
from tokenprune.reductions import Proof
from tokenprune.rewrite.settings import SETTINGS, CallSettings, PathName
from tokenprune.runtime.added import added_names
from tokenprune.runtime.difference import EXACT, TOLERANCE, difference, largest, with_itself
from tokenprune.runtime.model import pruning_of
from tokenprune.runtime.program import Program, Programs
from tokenprune.runtime.random_sets import random_sets
from tokenprune.runtime.steps import prove_steps
from tokenprune.tracing.arguments import Arguments, as_arguments
from tokenprune.tracing.functions import uncompiled
from tokenprune.tracing.interpret import returned_nodes, run, tensors_in
from tokenprune.tracing.modes import autocast_dtypes
from tokenprune.tracing.randomness import torch_generators_kept
from tokenprune.tracing.state import buffers_kept

__all__ = ["Theorems"]

SECOND = slice(1, 2)
"""The image that is also run alone."""
LEAST = {True: 2, False: 4}
"""The size of a batch that tells, of brief proofs and others."""


class Theorems:
    """The checks of one wrapped model, in eval mode, on one input; of programs of its own, or of
    those of the model that it is a copy of. `brief` ones run as few forwards as will do."""

    def __init__(
        self,
        model: nn.Module,
        given: Arguments | Mapping[str, Any],
        programs: Programs | None = None,
        *,
        brief: bool = False,
    ) -> None:
        pruning = pruning_of(model)
        inputs = as_arguments(type(model).__name__, given)
        self.programs = programs or pruning.programs(inputs)
        inputs = pruning.handing(inputs)
        self.model, self.inputs, self.host, self.brief = model, inputs, pruning.host, brief
        self.facts = self.programs.analysis.facts
        self.num_patches = self.programs.num_patches
        self.tensors, self.given = inputs.tensors, inputs.inputs
        first = next(iter(self.tensors.values()))
        self.batch_size = int(first.shape[0]) if first.ndim else 1
        self.pruned = pruning.path_name("gather")
        self._least = LEAST[brief]
        self.jagged = pruning.budget.threshold is not None
        share = 0.35 if brief else 0.65
        self.sets = random_sets(
            self.programs, self.batch_size, first.device, share, self._shortened
        )
        self.settings = self._settings_for(self.sets)
        self.dtype = first_floating(model).dtype
        casts = autocast_dtypes(self.programs.analysis.traced.graph)
        self.dtypes = (self.dtype, *casts)
        self.bound = largest(TOLERANCE, self.dtypes)
        self.probabilistic = pruning.method.scorer.probabilistic
        self.outputs: dict[PathName, list[Tensor]] = {}
        self.whole: list[Tensor] = []  # outputs with every token kept

    def _settings_for(self, sets: Sequence[Tensor]) -> CallSettings:
        forced = self.programs.reduction.forced(sets, self.num_patches)
        return CallSettings(num_keep=(), sample=False, **forced)

    def _shortened(self, kept: Tensor) -> Tensor:
        """Every other image keeps a quarter less, if images may differ."""
        if not self.jagged:
            return kept
        most = (kept >= 0).sum(1, keepdim=True)
        every_other = torch.arange(self.batch_size, device="cpu")[:, None] % 2
        fewer = (most - every_other * (most // 4).clamp_min(1)).clamp_min(1)
        return in_order(kept.where(torch.arange(kept.shape[1], device="cpu") < fewer, -1))

    def _run(self, path: PathName, settings: CallSettings | None = None) -> list[Tensor]:
        """The output of a path; without settings on the random kept sets, computed once."""
        if settings is None and path in self.outputs:
            return self.outputs[path]
        tensors = self._output(path, settings or self.settings, self.given)
        tensors = self.comparable(tensors) if path in ("mask", "expanded") else tensors
        if settings is None:
            self.outputs[path] = tensors
        return tensors

    def _output(
        self,
        path: PathName,
        settings: CallSettings,
        tensors: Mapping[str, Any],
        whole: bool = True,
    ) -> list[Tensor]:
        program = self.programs.get(self.host, path, whole)
        try:
            with self._alike():
                output, *_ = program.run(self.model, settings, **tensors)
        except (RuntimeError, IndexError) as error:
            at, inputs = None, {SETTINGS: settings, **tensors}
            with suppress(RuntimeError, IndexError):
                for node, _ in run(self.model, program.rewrite.graph, inputs):
                    at = node.next
            raise VerificationError(
                f"{type(self.model).__name__} cannot be pruned: its {path} path fails at "
                f"{program.rewrite.where(at) if at else 'its first node'}: {error}. If "
                "Python has made a number of how many tokens there were, leave that out, or prune "
                "this host after that node."
            ) from error
        return tensors_in(output)

    @contextmanager
    def _alike(self) -> Iterator[None]:
        """Each run begins with the same random numbers (a loss may draw the points that it looks
        at), and with the same buffers and weights, which a host's forward may write."""
        graph = self.programs.analysis.traced.graph
        with torch_generators_kept(self.host), buffers_kept(self.host, [graph]):
            yield

    def run_pruned(self) -> list[Tensor]:
        """The output on the random kept sets."""
        return self._run(self.pruned)

    def run_whole_or_not(self, path: PathName, whole: bool) -> list[Tensor]:
        """The output of a path on them, with or without the rows that nobody reads."""
        return self._output(path, self.settings, self.given, whole)

    def comparable(self, tensors: list[Tensor]) -> list[Tensor]:
        """The rows of a mask path's output that the gather path returns."""
        if self.programs.restore is not False:
            return tensors
        nodes = returned_nodes(self.programs.analysis.traced.graph.output_node().args[0])
        pairs = list(zip(nodes, tensors, strict=True))
        return [v if (k := self._kept_rows(n, v)) is None else k for n, v in pairs]

    def checks(self, gradients: bool) -> list[Check]:
        """All theorems: VerificationError at the first that does not hold."""
        with torch.no_grad():
            checks = [*self.identity(), *self.paths(), *self.contents(), *self.images()]
        if gradients:  # with the programs of a call that records gradients
            checks += Theorems(self.model, self.inputs).gradients()
        return checks

    def identity(self) -> Iterator[Check]:
        """Theorem 1: with every token kept, the pruned graph is the host, bit for bit."""
        whole = CallSettings(self.num_patches, sample=False)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # another kernel, with other rounding
        try:
            with self._alike(), uncompiled():
                dense = tensors_in(self.inputs.call(self.host.forward))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        self.whole = self._run(self.pruned, whole)
        check = Check("keep_ratio 1 is the host", difference(self.whole, dense), 0.0)
        if not check.passed:
            self.refuse(check, "the gather path with every token kept is not the host")
        yield check

    def paths(self) -> Iterator[Check]:
        """Theorem 2: paths that must agree do, on rows of kept tokens."""
        for claim in self.programs.reduction.proofs:
            if not self._at_once:
                apart = partial(Theorems._apart, claim=claim)
                yield self.compared(claim.name, apart, partial(Theorems._where_apart, claim=claim))

    def _apart(self, claim: Proof) -> float:
        return difference(self._run(claim.left), self._run(self._name(claim.right)))

    @property
    def _at_once(self) -> bool:
        """Whether theorems 2, 3 and 4 are one: the mask path of an image alone, with NaN and inf in
        dropped tokens, is the gather path of it in a batch."""
        bound, hides = self.programs.analysis.batch_bound, self.programs.reduction.hides
        return self.brief and hides and not (bound or self.jagged) and self.batch_size == 1

    def _name(self, path: PathName) -> PathName:
        return self.pruned if path == "gather" else path

    def contents(self) -> Iterator[Check]:
        """Theorem 3: what dropped tokens (bypass: branches not taken) hold is not read."""
        if not self.programs.reduction.hides or self._at_once:
            return
        yield self.compared(
            "dropped tokens may hold NaN and inf",
            lambda proof: difference(
                proof._run("mask", replace(proof.settings, poison=True)), proof._run("mask")
            ),
            lambda proof: "the contents of dropped tokens reach the output",
        )

    def images(self) -> Iterator[Check]:
        """Theorem 4: an image does not depend on the others of its batch."""
        if not self.programs.analysis.batch_bound:
            name = "an image alone = in a batch"
            what = "an image's output depends on the other images of its batch"
            if self._at_once:
                name = "mask = gather in a batch, dropped NaN, inf"
                what = f"mask and gather path differ, or dropped tokens are read, or {what}"
            yield self.compared(name, Theorems._alone_and_together, lambda _: what)

    def compared(
        self,
        name: str,
        measure: Callable[["Theorems"], float],
        what: Callable[["Theorems"], str],
        bounds: tuple[float, float] | None = None,
    ) -> Check:
        """Compare in the model's precision; if that fails, float64 tells a real difference from
        rounding that the host itself amplifies. `bounds` of both, if they are others."""
        bound, exact = bounds or (self.bound, EXACT)
        proof, check = self, Check(name, measure(self), bound)
        if not check.passed and bound > exact:
            given = f"({str(self.dtype).removeprefix('torch.')}: {check.error:.1e})"
            try:
                proof = self._in_float64
                check = Check(f"{name}, in float64 {given}", measure(proof), exact)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # quantised layers run in few dtypes, and say so in any way
                if self.jagged:
                    self.refuse(check, what(self))
                prove_steps(self.host, pruning_of(self.model).added, self.programs, self.inputs)
                return Check(f"{name}, operator by operator {given}", 0.0, bound)
        if not check.passed:
            proof.refuse(check, what(proof))
        return check

    @cached_property
    def _in_float64(self) -> "Theorems":
        double = copy.deepcopy(self.model).double()
        pruning_of(double).cache.proven_next = True
        return Theorems(double, self.inputs.in_dtype(torch.float64), brief=self.brief)

    def _alone_and_together(self) -> float:
        """The second image alone, and in a batch in which it is not the first, and, unless that is
        to be brief, not the last, nor in the middle, where turning the batch around leaves it."""
        if self.batch_size == 1:
            if self._at_once:
                self.outputs[self.pruned] = self._run("mask", replace(self.settings, poison=True))
            alone = self._run(self.pruned)
        else:
            alone = self._second_alone()
        enough = self.batch_size >= self._least
        batch = self._run(self.pruned) if enough else self._between_others()
        size = max(self.batch_size, self._least)
        together = [t[SECOND] if t.ndim and t.shape[0] == size else None for t in batch]
        pairs = [(a, b) for a, b in zip(alone, together, strict=True) if b is not None]
        pairs = [(a, with_itself(b, a, size, SECOND)) for a, b in pairs]
        return difference([self._as_long(a, b) for a, b in pairs], [b for _, b in pairs])

    def _as_long(self, alone: Tensor, together: Tensor) -> Tensor:
        """Rows of an image alone, with the empty ones that it has beside longer images."""
        if not self.jagged or self.programs.restore is not False:
            return alone
        return filled(alone, together.shape[1:])

    def _second_alone(self) -> list[Tensor]:
        """The gather path's output for the second image alone, of those that keep fewest tokens."""
        one = self.inputs.of_images(SECOND, self.batch_size).inputs
        sets = tuple(kept[SECOND, kept[1] >= 0] for kept in self.sets)
        return self._output(self.pruned, self._settings_for(sets), one)

    def _between_others(self) -> list[Tensor]:
        """The gather path's output for more images: those that there are, then the first one again.
        Of one image, its mirror image is around it."""
        rows = [row if row < self.batch_size else 0 for row in range(self._least)]
        given: dict[str, Any] = {name: value[rows] for name, value in self.batched().items()}
        for name, value in self.inputs.handed.items():
            if isinstance(value, list | tuple):
                given[name] = [value[row] for row in rows]
        sets = [kept[rows] for kept in self.sets]
        if self.batch_size == 1:
            others = [row for row in range(self._least) if row != SECOND.start]
            for name in self.batched():
                given[name][others] = given[name][others].flip(-1)
            for kept, patches in zip(sets, self.num_patches, strict=True):
                kept[others] = patches - 1 - kept[others].flip(1)
        return self._output(self.pruned, self._settings_for(sets), self.given | given)

    def of_one_image(self) -> "Theorems":
        """The same of the last image alone, if the programs hold for it."""
        if self.batch_size == 1 or self.programs.analysis.batch_bound:
            return self
        last = self.inputs.of_images(slice(-1, None), self.batch_size)
        return Theorems(self.model, last, brief=self.brief)

    def images_alike(self) -> bool:
        """Whether images that were beside each other are equal, so that mixing them would change
        nothing."""
        images = self.batched().values()
        if self.batch_size == 1:
            return all(torch.equal(image, image.flip(-1)) for image in images)
        return all(
            any(torch.equal(i[1], i[place]) for place in (0, *([-1] if len(i) > 2 else [])))
            for i in images
        )

    def batched(self) -> dict[str, Tensor]:
        """The inputs that have a row for each image."""
        return {n: v for n, v in self.tensors.items() if v.shape[:1] == (self.batch_size,)}

    def gradients(self) -> Iterator[Check]:
        """Theorems 6 and 7: every parameter of the scorers gets a finite gradient."""
        named, names = self.model.named_parameters(), added_names()
        parameters = [p for n, p in named if n.startswith(names) and p.is_floating_point()]
        if parameters:  # else the scorers have none, and no gradient is claimed
            with requiring_grad(parameters, True):  # frozen ones are proven as if they were trained
                yield self._gradients_of(parameters)

    def _gradients_of(self, parameters: Sequence[nn.Parameter]) -> Check:
        generator = torch.Generator(parameters[0].device).manual_seed(0)
        settings = CallSettings((), sample=True, generator=generator)
        program = self.programs.get(self.host, "mask", whole=True)
        output, records, *_ = program.run(self.model, settings, **self.given)
        loss = sum(t.float().square().mean() for t in tensors_in(output) if t.requires_grad)
        loss = loss + sum(decision.mean() for _, decision in records)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        missing = sum(g is None or not bool(torch.isfinite(g).all()) for g in found)
        check = Check("predictor parameters without a finite gradient", float(missing), 0.0)
        if not check.passed:
            self.refuse(check, "the predictors cannot be trained")
        return check

    def refuse(self, check: Check, what: str) -> None:
        raise VerificationError(
            f"{type(self.model).__name__} cannot be pruned safely: {what}. Check '{check.name}': "
            f"difference {check.error:.2e} relative to the output's scale, allowed "
            f"{check.bound:.0e}. Leave this host dense, or prune it after that node."
        )

    def _where_apart(self, claim: Proof) -> str:
        """Run both paths in step and name the first node whose kept rows differ."""
        differ = f"{claim.left} and {claim.right} path differ"
        names = (claim.left, self._name(claim.right))
        left, right = (self.programs.get(self.host, name, whole=True) for name in names)
        theirs = self._values(right)
        ahead: dict[fx.Node, Any] = {}
        for origin, ours in self._values(left):
            while origin not in ahead and (step := next(theirs, None)) is not None:
                ahead[step[0]] = step[1]
            other = ahead.pop(origin, None)
            if isinstance(ours, Tensor) and isinstance(other, Tensor):
                kept = self._kept_rows(origin, ours)
                if kept is None or kept.shape != other.shape:
                    continue
                other = self._blank(origin, other)
                if not difference([kept], [other]) <= self.bound:
                    where = origin.meta["where"]
                    return f"{differ} first at node '{origin.name}' ({origin.target}) of {where}"
        return f"{differ} at the output"

    def _values(self, program: Program) -> Iterator[tuple[fx.Node, Any]]:
        inputs = {SETTINGS: self.settings, **self.given}
        for node, value in run(self.model, program.rewrite.graph, inputs):
            origin = program.rewrite.origin(node)
            if origin is not None:
                yield origin, value

    def _kept_rows(self, origin: fx.Node, value: Tensor) -> Tensor | None:
        facts = self.facts[origin]
        dims = facts.dims
        if not dims:
            return None if facts.folded else value
        if facts.rows_per_image != 1 or 0 in dims:
            return None
        kept = self.sets[max(dim.stage for dim in dims.values())]
        prefix = tuple(dim.prefix for dim in dims.values())
        rows = gather_aligned(value, kept.clamp_min(0), tuple(dims), prefix, value.ndim)
        return self._blank(origin, rows)

    def _blank(self, origin: fx.Node, rows: Tensor) -> Tensor:
        """`rows` with 0 where an image has no token."""
        for d, dim in self.facts[origin].dims.items():
            rows = blank_padding(rows, self.sets[dim.stage], dim.prefix, d)
        return rows
