"""A new program, proven operator by operator on random numbers.

`wrap` proves what it makes as a whole. A later program may hold operators that no proof has seen:
the host was changed, or runs in training mode. Its path on which dropped tokens are hidden runs in
step with the one on which they have left, in a batch with other images. After each operator, rows
of kept tokens must be equal; then both paths get the same random numbers there. So each operator is
proven by itself: weights that are zero hide nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_arg

from tokenprune.analysis.facts import NodeFacts
from tokenprune.analysis.operators import Kind, kind_of
from tokenprune.errors import LeakError, UnsupportedHostError
from tokenprune.ops.moving import gather_aligned
from tokenprune.private import temporarily_clear_interpreter_stack, without_modes
from tokenprune.rewrite.settings import SETTINGS, CallSettings, PathName
from tokenprune.rewrite.stages import score
from tokenprune.runtime.program import Programs
from tokenprune.runtime.random_sets import random_sets
from tokenprune.runtime.step_values import (
    BEFORE,
    BEHIND,
    close,
    first_tensor,
    hides_its_node,
    in_dtype_of,
    is_elsewhere,
    is_number,
    runs_in,
    shares_memory,
    with_images,
)
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.draws import DRAWS
from tokenprune.tracing.effects import Store, written_weight
from tokenprune.tracing.hook_nodes import is_hook_node
from tokenprune.tracing.hooks import UNHOOKED, calls_unhooked
from tokenprune.tracing.interpret import Environment, evaluate, run, tensor_attribute
from tokenprune.tracing.modes import autocast_dtypes
from tokenprune.tracing.randomness import torch_generators_kept
from tokenprune.tracing.state import attributes_kept, buffers_kept, no_autocast_cache
from tokenprune.tracing.tracer import ONE_AT_A_TIME

__all__ = ["prove_steps"]

DRAWN = DRAWS | {"empty", "new_empty", "empty_like", "empty_strided"}
"""Operators that give other numbers each time; of memory that nobody has written to, too."""


def prove_steps(
    host: nn.Module, added: Mapping[str, nn.Module], programs: Programs, arguments: Arguments
) -> None:
    """Prove programs that nobody has proven, on the arguments of a call.

    Raises:
        LeakError: An operator reads other tokens, or other images, and no rule knows it.
        UnsupportedHostError: One fails where tokens have left.
    """
    if any(tensor.is_meta for tensor in arguments.tensors.values()):
        return  # such a call computes nothing
    root = nn.Module()
    root.__dict__ = {**vars(host), "_modules": {**host._modules, **added}}
    given = arguments if len(first_tensor(arguments)) else arguments.with_images()
    with _nothing_stays(host, programs.analysis.traced.graph):
        apart = Steps(root, programs, given, apart=not programs.analysis.batch_bound).run()
        if apart.leak is not None or apart.unclear:
            together = Steps(root, programs, given, apart=False).run()
            if together.leak is not None:
                _refuse(
                    programs, together.leak, "tokens", "dropped ones are hidden from the others"
                )
            if apart.leak is not None:
                _refuse(programs, apart.leak, "images", "an image is kept from the others")
        if programs.unread_rows:
            _prove_unread(root, programs, given)
    programs.proven = True


def _prove_unread(root: nn.Module, programs: Programs, given: Arguments) -> None:
    """Raise LeakError if rows are read that a path leaves out."""
    for path in ("gather", "mask") if programs.reduction.hides else ("gather",):
        rows = Steps(root, programs, given, apart=False)
        rows.compare_whole(path)
        if rows.run().leak is not None:
            raise LeakError(
                f"'{rows.leak.name}' ({rows.leak.target}) at {rows.leak.meta['where']} reads rows "  # type: ignore[union-attr]
                "that `unread_rows` leaves out, and no rule says so: it is new since "
                f"{programs.analysis.traced.host} was wrapped. Leave it out, or wrap the model "
                "without `unread_rows`."
            )


@contextmanager
def _nothing_stays(host: nn.Module, graph: fx.Graph) -> Iterator[None]:
    """The host, its hooks, the caller's modes and random numbers do not see what runs inside."""
    with ExitStack() as stack:
        for state in (
            *(ONE_AT_A_TIME, torch.no_grad(), without_modes(), torch_generators_kept(host)),
            *(temporarily_clear_interpreter_stack(), no_autocast_cache(), calls_unhooked()),
            *(attributes_kept(host), buffers_kept(host, [graph])),
        ):
            stack.enter_context(state)
        yield


def _refuse(programs: Programs, leak: fx.Node, what: str, missing: str) -> None:
    raise LeakError(
        f"'{leak.name}' ({leak.target}) at {leak.meta['where']} mixes {what}, and no rule says how "
        f"{missing}: it is new since {programs.analysis.traced.host} was wrapped, or weights that "
        "are zero hid it. Leave it out, write a rule (tokenprune.rewrite.rule), or unwrap the "
        "model and wrap it with `mode: bypass`."
    )


class _FailedError(Exception):
    """A node fails: it, and why."""


@dataclass
class _Step:
    """What a node is on the first path: as it was computed, as it goes on from there, what is known
    of it, and what the weight held that it writes into."""

    computed: Any
    value: Any
    noisy: bool
    facts: NodeFacts
    held: Tensor | None


class Steps:
    """Two paths of some programs, run in step. On one dropped tokens are hidden, from the other
    they have left. Where they leave for parts of blocks alone, tensors are compared where both
    paths hold all tokens; where there is one path, it is proven for images.

    Args:
        apart: The second path has other images too; else both have the same ones.

    Attributes:
        leak: The first node whose rows of kept tokens differ.
        unclear: Something differs that is of no image and no token, such as a mean of a batch.
        rounded: The dtypes that values were rounded to so far.
    """

    def __init__(
        self, root: nn.Module, programs: Programs, arguments: Arguments, *, apart: bool
    ) -> None:
        self.root, self.programs, self.apart = root, programs, apart
        reduction = programs.reduction
        size, self.device = len(first_tensor(arguments)), first_tensor(arguments).device
        # in training a batch of one has no variance
        alone = 2 if any(module.training for module in root.modules()) else 1
        self.images = alone if apart else size
        others = BEFORE + BEHIND if apart else 0
        self.inputs = [with_images(arguments, size, self.images, more) for more in (False, apart)]
        sets = random_sets(programs, self.images + others, self.device)
        self.ours = slice(BEFORE, BEFORE + self.images) if apart else slice(None)
        self.sets = tuple(kept[self.ours] for kept in sets)
        self.settings = [
            CallSettings((), sample=False, **reduction.forced(each, programs.num_patches))
            for each in (self.sets, sets)
        ]
        self.paths: list[PathName] = ["gather", "gather"]
        self.wholes = (True, True)
        if reduction.proofs:
            self.paths[0] = reduction.proofs[0].left
        self.leave = reduction.removes and self.paths[0] != "gather"
        self.hides = self.lively = self.leave and self.paths[0] == "mask"
        self.leak: fx.Node | None = None
        self.unclear = False
        self.given = first_tensor(arguments).dtype
        self.away: torch.dtype | None = None
        self.rounded = autocast_dtypes(programs.analysis.traced.graph)

    def compare_whole(self, path: PathName) -> None:
        """Run one path twice: whole, and without the rows that nobody reads."""
        self.paths, self.wholes = [path, path], (True, False)
        self.leave = self.hides = self.lively = False

    def run(self) -> "Steps":
        """Run them.

        Raises:
            UnsupportedHostError: A node fails.
        """
        failed = list[_FailedError]()
        # perhaps on numbers that no host makes, or since hooks bring weights in another dtype
        for lively, away in [(self.lively, None), (False, None), (self.lively, self.given)]:
            self.lively, self.away, self.leak, self.unclear = lively, away, None, False
            try:
                self._run()
            except _FailedError as error:
                failed.append(error)
            else:
                return self
        node, cause = failed[1].args
        raise UnsupportedHostError(
            f"'{node.name}' ({node.target}) at {node.meta.get('where')} is new since this "
            f"{self.programs.analysis.traced.host} was wrapped, and fails where tokens have left: "
            f"{cause}. Leave it out, or unwrap the model and wrap it again."
        ) from cause

    def _run(self) -> None:
        get, ahead = self.programs.get, dict[fx.Node, _Step]()
        both = zip(self.paths, self.wholes, strict=True)
        ours, theirs = (get(self.root, name, whole).rewrite for name, whole in both)
        wanted = {theirs.origin(node): theirs.facts(node) for node in theirs.nodes()}

        def lead(node: fx.Node, env: Environment) -> Any:
            origin, before, written = ours.origin(node), self._noise(), self._written(node)
            held = None if written is None else written.clone()
            value = self._value(node, env)
            if origin is None or origin not in wanted:
                return value
            name = str(getattr(origin.target, "__name__", origin.target))
            noisy = name in DRAWN or not torch.equal(before, self._noise())
            value = self._without_noise(node, env, value) if noisy else value
            step = _Step(value, value, noisy, ours.facts(node), held)
            alike = step.facts.dims == wanted[origin].dims
            if self.lively and alike and not shares_memory(value, node, env):
                step.value = self._other(step.facts, value)
            ahead[origin] = step
            return step.value

        leading = run(self.root, ours.graph, self._given(0), lead)
        astray = set[fx.Node]()  # other than on the first path, by noise alone

        def follow(node: fx.Node, env: Environment) -> Any:
            origin, written = theirs.origin(node), self._written(node)
            led = any(used in astray for used in node.all_input_nodes)
            while origin is not None and origin not in ahead and next(leading, None) is not None:
                pass
            step = ahead.pop(origin, None) if origin is not None else None
            if step is not None and step.held is not None and written is not None:
                written.copy_(step.held)
            value = self._value(node, env)
            if step is not None and step.noisy:
                value = self._without_noise(node, env, value)
            dims = theirs.facts(node).dims
            noisy = led or (step is not None and step.noisy)
            known = step is not None and isinstance(value, Tensor) and step.facts.dims == dims
            if origin is None or step is None or not known:
                astray.update({node} if noisy else ())
                return value
            shared = shares_memory(value, node, env)
            if self.apart and self._reads_batch(origin):
                noisy, self.unclear = True, self.unclear or bool(dims)
            value, alike = self._compared(origin, step, value, noisy, shared)
            astray.update({node} if noisy and not alike else ())
            return value

        for _ in run(self.root, theirs.graph, self._given(1), follow):
            pass

    def _without_noise(self, node: fx.Node, env: Environment, value: Any) -> Any:
        """What a node that draws noise gives without it, where members of a group must stay equal:
        what it is given."""
        given = env[node.all_input_nodes[0]] if node.all_input_nodes else None
        if self.hides or not (isinstance(given, Tensor) and isinstance(value, Tensor)):
            return value
        return given if given.shape == value.shape and given.dtype == value.dtype else value

    def _given(self, path: int) -> dict[str, Any]:
        return {SETTINGS: self.settings[path], **self.inputs[path]}

    def _noise(self) -> Tensor:
        """The state of the random numbers that a node would draw."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)

    def _written(self, node: fx.Node) -> Tensor | None:
        """The weight that a node writes into."""
        path = written_weight(node)
        held = None if path is None else tensor_attribute(self.root, path)
        return held if isinstance(held, Tensor) and not is_elsewhere(held) else None

    def _value(self, node: fx.Node, env: Environment) -> Any:
        """What a node gives; no hook runs, nothing is set, and weights that are zero, or that hooks
        bring from elsewhere, are random numbers."""
        if isinstance(node.target, Store) or is_hook_node(node):
            return None
        try:
            with buffers_kept(runs_in(self.root, node)):  # each path sees what the other one saw
                value = self._evaluated(node, env)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _FailedError(node, error) from error
        return self._near(value) if hides_its_node(value) else value

    def _evaluated(self, node: fx.Node, env: Environment) -> Any:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            away = {name: self._near(t) for name, t in held.items() if hides_its_node(t)}
            elsewhere = any(map(is_elsewhere, held.values()))
            if UNHOOKED in node.meta or elsewhere:  # hooks may store weights in another dtype
                away |= in_dtype_of(args, {**held, **away})
            if away:
                return functional_call(module, away, args, kwargs)
        if node.target is score:
            scored: Any = map_arg(node.args, env.__getitem__)
            return self._unscored(*scored)
        return evaluate(self.root, node, env)

    @staticmethod
    def _unscored(_: nn.Module, tokens: Tensor, __: Tensor | None, num_prefix: int) -> Tensor:
        """Scores that nobody reads, since the kept sets are forced."""
        return tokens.new_zeros(len(tokens), tokens.shape[1] - num_prefix, 2)

    def _near(self, tensor: Tensor) -> Tensor:
        """Random numbers in the place of a weight, the same on both paths."""
        kept = self.away is None or not (is_elsewhere(tensor) and tensor.is_floating_point())
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(tuple(tensor.shape), generator=generator, device="cpu") * 0.1
        return drawn.to(self.device, tensor.dtype if kept else self.away)

    def _other(self, facts: NodeFacts, value: Any) -> Any:
        """`value` with random numbers of its scale in the entries of kept tokens, if it has such;
        what is positive stays so."""
        if not (facts.dims and is_number(value) and self._comparable(facts, value)):
            return value
        kept = self._where_kept(facts, value)
        inside = value.where(kept, 0)
        drawn = torch.rand_like(value, dtype=torch.float32)
        if value.is_complex() or bool(inside.amin() < 0) or not bool(inside.any()):
            size = inside.abs().float().square().mean().sqrt()
            size = torch.where((size > 0) & size.isfinite(), size, 1.0)
            return torch.where(kept, ((drawn * 4 - 2) * size).to(value.dtype), value)
        return torch.where(kept, (value * (drawn + 0.5)).to(value.dtype), value)

    def _where_kept(self, facts: NodeFacts, value: Tensor) -> Tensor:
        """True for entries of kept tokens on all dims; broadcasts to `value`."""
        found = torch.ones((), dtype=torch.bool, device=value.device)
        for dim, tokens in facts.dims.items():
            sets = self.sets[tokens.stage]
            there = sets.new_zeros(len(sets), value.shape[dim], dtype=torch.bool)
            there[:, : tokens.prefix] = True
            there.scatter_(1, sets + tokens.prefix, True)
            shape = [len(sets), *(1 for _ in value.shape[1:])]
            shape[dim] = value.shape[dim]
            found = found & there.reshape(shape)
        return found

    @staticmethod
    def _comparable(facts: NodeFacts, value: Tensor) -> bool:
        """Whether it is known where the entries of kept tokens are. Where a graph holds for one
        batch size alone, dim 0 may have the size of another dim by chance."""
        sure = facts.batched or value.shape.count(len(value)) == 1
        return sure and facts.rows_per_image == 1 and 0 not in facts.dims

    def _compared(
        self, origin: fx.Node, step: _Step, theirs: Tensor, noisy: bool, shared: bool
    ) -> tuple[Tensor, bool]:
        """What goes on on the second path, after a comparison with the first; and whether both are
        alike from there."""
        facts = step.facts
        if not isinstance(step.computed, Tensor):
            return theirs, False
        ours, part = self._rows(facts, step.computed), self._of_ours(facts, theirs, step.computed)
        if ours is None or part is None or ours.shape != part.shape:
            return theirs, False
        if is_number(ours):
            self.rounded.add(ours.dtype)
        alike = not is_number(ours) or close(ours, part, self.rounded)
        if not noisy and not alike:
            if facts.dims or facts.rows_per_image is not None or not self.apart:
                self.leak = self.leak or origin
            self.unclear = True
        differs = not alike and not noisy
        if step.value is step.computed and (shared or differs or not is_number(ours)):
            return theirs, alike  # else rounding would reach the next operator
        goes_on = self._rows(facts, step.value)
        if goes_on is None or (facts.rows_per_image or 1) > 1:  # nobody knows which rows are whose
            return theirs, False
        theirs = theirs if shared else theirs.clone()
        (theirs[self.ours] if facts.rows_per_image else theirs).copy_(goes_on)
        return theirs, True

    def _reads_batch(self, origin: fx.Node) -> bool:
        """Whether a node may read all images of a batch, as batch norms do in training."""
        normed = origin.target is F.batch_norm
        return normed or kind_of(self.root, origin) is Kind.BATCH_STATISTIC

    def _rows(self, facts: NodeFacts, value: Tensor) -> Tensor | None:
        """The rows of kept tokens; None if nobody knows where they are."""
        if not facts.dims or not self.leave:
            return None if facts.folded and self.leave else value
        if not self._comparable(facts, value):
            return None
        kept = self.sets[max(dim.stage for dim in facts.dims.values())]
        prefix = tuple(dim.prefix for dim in facts.dims.values())
        return gather_aligned(value, kept, tuple(facts.dims), prefix, value.ndim)

    def _of_ours(self, facts: NodeFacts, theirs: Tensor, ours: Tensor) -> Tensor | None:
        """The part of `theirs` that is of the images of the first path; rows of one image may stand
        side by side, or one after each image."""
        if not self.apart or not (facts.batched or facts.folded):
            return theirs
        if facts.rows_per_image is None:
            return None
        count, rest = self.images + BEFORE + BEHIND, theirs.shape[1:]
        each = len(theirs) // count
        part = theirs.reshape(count, each, *rest)[self.ours].flatten(0, 1)
        side_by_side = part.shape == ours.shape and facts.rows_per_image > 1
        if facts.rows_per_image > 1 and not (side_by_side and close(ours, part, self.rounded)):
            part = theirs.reshape(each, count, *rest)[:, self.ours].flatten(0, 1)
        return part
