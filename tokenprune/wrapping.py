"""`wrap` and `unwrap`: the public entry points."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.analysis.plan import bind
from tokenprune.analysis.reading import Reading, prefix_at, readings, settle
from tokenprune.checks.verify import takes_long, verify_wrapped
from tokenprune.cost.auto import choose
from tokenprune.errors import (
    AlreadyWrappedError,
    NonFiniteWeightsError,
    PlanError,
    TokenPruneError,
    TokensReturnedError,
    TraceError,
    UnsupportedHostError,
    VerificationError,
)
from tokenprune.hosts.inputs import CallSignature, ExampleInputs, first_floating, named_inputs
from tokenprune.hosts.registry import GENERIC, hints, stated_by, tower_of
from tokenprune.hosts.spec import ArchSpec
from tokenprune.notices import warn_once
from tokenprune.recipe import Recipe, RecipeSource, load_recipe
from tokenprune.reductions import MODES
from tokenprune.reductions.choice import choice_of, with_default_stages
from tokenprune.runtime.added import added_names
from tokenprune.runtime.model import (
    PRUNING,
    PUBLIC,
    PrunedModel,
    as_host,
    pruning_of,
    wrapper_of,
)
from tokenprune.runtime.pruning import Pruning
from tokenprune.scorers.protocol import PREDICTORS, Predictors
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.as_needed import trace_call
from tokenprune.tracing.closed import refuse_closed
from tokenprune.tracing.collector import collector_paused
from tokenprune.tracing.contents import slots_of
from tokenprune.tracing.host_graph import HostGraph, explained
from tokenprune.tracing.stand_ins import is_plain
from tokenprune.tracing.state import in_mode

__all__ = ["unwrap", "wrap"]


def wrap(
    model: nn.Module,
    recipe: RecipeSource | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
    adapter: str | ArchSpec | None = None,
    restore: bool | None = None,
    verify: bool = True,
    train: bool = True,
) -> Any:
    """Make a vision transformer prune its tokens.

    The result has the host's class, call signature, output type and methods. Both are handles on
    one set of attributes: a change through either is seen by the next call of both. In training
    every token stays and dropped ones are hidden from the others, so that the predictors learn; in
    eval they are removed. Scorers without parameters remove them in training too. Methods that run
    the blocks (`forward_features`) are pruned as well. The host object itself still runs dense, and
    so does a child of it (`model.vit`), unless it is wrapped itself.

    Args:
        model: The host: any timm or transformers model, or another `nn.Module` with a stack of
            transformer blocks.
        recipe: A shipped recipe's name, a path, a mapping, a `Recipe` or a method of
            `tokenprune.methods`. If None, one is made for the host: three stages that keep 0.7 of
            the tokens each, in the mode that serves it. Methods that need no training have names
            with their number, for any host: `merge-k0.7` lets similar tokens become their mean,
            `tome-r13` merges 13 in every block, `evit-k0.7` lets those that leave go on as one;
            `tokenprune.methods.list_methods()` has all, `tokenprune.compare` tells which suits.
            `auto` (or `auto-k0.5`) counts what each reduction saves on this host and takes the one
            that saves most; `print(tokenprune.profile(model))` says which, and why not the others.
        example_inputs: A tensor, several, or the arguments by name; drawn at random in the shape
            the host was built for if None.
        adapter: An adapter's name, or an `ArchSpec`; found by itself if None.
        restore: For outputs that hold tokens (`last_hidden_state`, `hidden_states`): True gives
            every token back in place, dropped ones with the value they had when they were dropped,
            merged ones with that of their group; False leaves only kept tokens in eval. None
            refuses such an output by name.
        verify: Prove on this very model that the paths agree; where an image takes more than 100
            GMACs, in fewer forwards than `tokenprune.verify` runs.
        train: Also trace the host in training mode, for the first training step. If that fails
            while the host is in eval mode, a `TokenPruneWarning` says why, and the first call in
            training mode raises it. False leaves it out, for a model that only serves: `wrap`
            takes about half the time, and training traces when it begins.

    Raises:
        RecipeError: The recipe cannot be read (`UnknownRecipeError`: there is none of that name).
        PlanError: It does not fit this host.
        AlreadyWrappedError: `model` is wrapped already.
        UnsupportedHostError: The host cannot be pruned; the node or module is named.
        NonFiniteWeightsError: Its weights hold NaN or inf.
        VerificationError: The paths disagree; the first node where they part is named.

    Example:
        >>> model = tokenprune.wrap(host, "dynamicvit-deit-small-k0.7")
        >>> model = tokenprune.wrap(host_without_a_recipe)
    """
    if isinstance(model, PrunedModel) and hasattr(model, PRUNING):
        raise AlreadyWrappedError(
            f"This {type(model).__name__} is wrapped already. Call tokenprune.unwrap(model) first, "
            "or model.set_keep_ratio(0.5) to prune it otherwise."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedHostError(
            f"wrap needs an nn.Module, found {type(model).__name__}. Pass the host itself."
        )
    model = as_host(model)
    inner = next((path for path, m in model.named_modules() if isinstance(m, PrunedModel)), None)
    if inner is not None:
        raise AlreadyWrappedError(
            f"Module '{inner}' of this {type(model).__name__} is wrapped already. Use "
            "tokenprune.unwrap on it first, or wrap only the outer model."
        )
    _check_free(model)
    chosen = None if recipe is None else load_recipe(recipe)
    with explained(model):
        known = hints(model, adapter)
        _check_known(chosen, known)
        _check_finite(model)
        call = CallSignature.of(type(model))
        example = named_inputs(call, known, model, example_inputs)
        task = _Task(model, adapter, known, chosen, call, example, restore, verify, train)
        with collector_paused():
            return task.done()


@dataclass(frozen=True)
class _Task:
    """What `wrap` was asked, once its arguments are checked; `hints` is what the adapter says."""

    host: nn.Module
    adapter: str | ArchSpec | None
    hints: ArchSpec
    recipe: Recipe | None
    call: CallSignature
    example: Arguments
    restore: bool | None
    verify: bool
    train: bool

    def done(self) -> Any:
        """The wrapped model, by the first reading of the host that is proven.

        Raises:
            TokenPruneError: None is; what stands in the way of the likeliest one.
        """
        if self.recipe is not None and self.recipe.is_open:
            return choose(self.host, self.recipe, self)
        asked, guessed = self._asked(self.recipe)
        refused: list[TokenPruneError] = []
        for reading in self.ways(self.recipe):
            try:
                wrapped = self.proven(self.planned(self.recipe, reading))
            except TokensReturnedError:
                raise  # the caller is to say what becomes of them
            except (PlanError, UnsupportedHostError, VerificationError) as error:
                if isinstance(error, VerificationError) and not (guessed or refused):
                    raise  # the facts are right; what does not hold is the host's
                refused.append(error)
            else:
                if refused and asked is None and reading.mode is not None:
                    self._say_mode(reading.mode, refused[0])
                return wrapped
        raise refused[0]

    def _asked(self, recipe: Recipe | None) -> tuple[str | None, bool]:
        """The mode that is asked for, and whether the facts about the host are guessed."""
        guessed = self.adapter in (None, GENERIC) and self.hints.adapter == GENERIC
        if recipe is not None and "mode" in recipe.model_fields_set:
            return recipe.mode, guessed
        return self.hints.mode if isinstance(self.adapter, ArchSpec) else None, guessed

    def ways(self, recipe: Recipe | None) -> list[Reading]:
        """The ways to read the host for a recipe, the likeliest first."""
        asked, guessed = self._asked(recipe)
        stay = asked is not None and not MODES[asked].removes
        return readings(self.hints, guessed=guessed, asked=asked is not None, tokens_stay=stay)

    def _say_mode(self, mode: str, refused: TokenPruneError) -> None:
        warn_once(
            self.host,
            f"mode: {mode}",
            f"This {type(self.host).__name__} was wrapped with `mode: {mode}`, in which every "
            f"tensor keeps its size. Tokens cannot leave it: {refused} Put `mode: {mode}` into the "
            "recipe to choose it without this warning.",
        )

    @property
    def traced(self) -> HostGraph:
        """The trace of the host in eval; nothing is marked in it."""
        return self._traced[0]

    @cached_property
    def _traced(self) -> tuple[HostGraph, Arguments]:
        """The same, and the example as it takes it."""
        stated = stated_by(self.host, self.hints)
        with in_mode(self.host, training=False):
            try:
                return trace_call(self.host, self.example, stated=stated)
            except TraceError as error:
                tower = tower_of(self.host)
                if not tower:
                    raise
                raise TraceError(
                    f"{error} Its vision tower can be wrapped alone: host.{tower} = "
                    f"tokenprune.wrap(host.{tower}, restore=True)."
                ) from error

    def planned(self, recipe: Recipe | None, reading: Reading) -> Pruning:
        """What prunes the host, with the program that serves; nothing is added to it yet."""
        _check_known(recipe, self.hints)
        host, (traced, example) = self.host, self._traced
        traced = traced.copy()  # where blocks are is marked in it
        with in_mode(host, training=False):
            spec, blocks = settle(host, traced, self.hints, reading)
            open_ = recipe is not None and "mode" not in recipe.model_fields_set
            if recipe is not None and open_ and reading.mode is not None:
                recipe = recipe.model_copy(update={"mode": reading.mode})
            if recipe is not None:
                choice_of(recipe, spec)
            chosen = with_default_stages(recipe, host, spec, traced, blocks)
            method = choice_of(chosen, spec)
            if method.reduction.removes:
                staged = [stage.block for stage in chosen.resolved_stages]
                spec = prefix_at(host, traced, spec, blocks, reading, staged)
                choice_of(chosen, spec)  # other tokens may be the host's own there
            plan, budget = bind(chosen, spec)
            pruning = Pruning(
                host=host,
                adapter=self.adapter,
                reading=reading.found(blocks),
                spec=spec,
                recipe=chosen,
                method=method,
                plan=plan,
                budget=budget,
                call=self.call,
                restore=self.restore,
                example=example.with_tensors({n: x.to("meta") for n, x in example.tensors.items()}),
                asked=self.hints.inputs,
                handed={"forward": tuple(example.handed_places)},
            )
            programs = pruning.programs(example, traced=traced, blocks=blocks)
            programs.reduction.check_use(host)
            programs.get(host, pruning.path_name(pruning.method.path(training=False)))
        return pruning

    def equip(self, pruning: Pruning) -> None:
        """Make the modules that pruning adds to the host."""
        (programs, *_), first = pruning.cache, first_floating(self.host)
        like = {"device": first.device, "dtype": first.dtype}
        make, grids = pruning.method.scorer.make, programs.analysis.grids
        section = pruning.recipe.predictor
        with torch.inference_mode(False):  # what it adds may be trained later
            scorers = [make(grid.num_channels, section, **like) for grid in grids]
            added = {PREDICTORS: Predictors(*scorers), **programs.reduction.modules(**like)}
        pruning.added.update({name: m.train(self.host.training) for name, m in added.items()})

    def proven(self, pruning: Pruning) -> Any:
        """The wrapped model, traced in training mode and verified as far as that is asked for."""
        host, (_, example) = self.host, self._traced
        self.equip(pruning)
        refused = _trace_training(pruning, example, self.verify) if self.train else None
        wrapped = wrapper_of(pruning)
        if self.verify:
            verify_wrapped(wrapped, example)
        if refused is not None:  # now that this reading is the one
            warn_once(
                host,
                "cannot train",
                f"This {type(host).__name__} cannot run in training mode once it is wrapped; the "
                f"first such call raises this: {refused} If the model only serves, pass "
                "train=False to wrap.",
            )
        pruning.follow_mode()
        return wrapped


def _check_known(recipe: Recipe | None, known: ArchSpec) -> None:
    """Raise PlanError if a recipe does not fit what an adapter knows of a host without a trace."""
    if recipe is not None and not recipe.is_open and known.blocks:
        choice_of(recipe, known)
        bind(recipe, known)


def _trace_training(pruning: Pruning, example: Arguments, prove: bool) -> TokenPruneError | None:
    """Make the program of the first training step, and `prove` it unless that takes long: the first
    step does so then. What stands in the way, if the host is in eval mode, where it may do without.
    """
    host = pruning.host
    training = host.training
    with in_mode(host, training=True) if not training else nullcontext():
        try:
            path = pruning.path_name(pruning.method.path(training=True))
            programs = pruning.programs(example)
            programs.get(host, path)
            if prove and not takes_long(host, programs.analysis):
                pruning.prove(programs, pruning.handing(example))
        except TokenPruneError as error:
            if training:
                raise
            return error
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The host of a wrapped model; with its weights as they are now, and no pruning.

    Args:
        model: What `wrap` returned.

    Raises:
        NotWrappedError: `model` was not returned by `wrap`.
    """
    return pruning_of(model).host


def _check_free(host: nn.Module) -> None:
    refuse_closed(host)
    own: Any = host.__dict__.get("forward")
    if getattr(own, "__func__", None) is type(host).forward and own.__self__ is host:
        del host.__dict__["forward"]  # accelerate leaves the class's own there, as an attribute
    if "forward" in host.__dict__:
        raise UnsupportedHostError(
            f"The forward of this {type(host).__name__} was replaced on the object (accelerate and "
            "some profilers do so). Wrap first, then prepare what wrap returned: take accelerate's "
            "hooks off again by accelerate.hooks.remove_hook_from_submodules(host), call model = "
            "tokenprune.wrap(host, recipe), and then accelerate.cpu_offload(model)."
        )
    taken = [name for name in (*added_names(), PRUNING, *PUBLIC) if hasattr(host, name)]
    if taken:
        raise UnsupportedHostError(
            f"{type(host).__name__} has an attribute {taken[0]!r} of its own, a name that "
            "tokenprune needs. Rename it in the host."
        )
    slots = slots_of(type(host)) - {"__dict__", "__weakref__"}
    if slots:
        raise UnsupportedHostError(
            f"{type(host).__name__} has __slots__ ({', '.join(sorted(slots))}). What is in slots "
            "cannot be shared by a host and its wrapped model, as attributes are. Take __slots__ "
            "out of the class."
        )
    if "return_trace" in CallSignature.of(type(host)).names:
        raise UnsupportedHostError(
            f"The forward of {type(host).__name__} has an argument 'return_trace', a name that "
            "tokenprune needs. Rename it in the host."
        )


def _check_finite(host: nn.Module) -> None:
    for name, buffer in host.named_buffers():  # -inf is common there: attention masks
        known = buffer.is_floating_point() and not buffer.is_meta
        if known and bool(_computable(buffer).isnan().any()):
            raise NonFiniteWeightsError(
                f"Buffer '{name}' of {type(host).__name__} holds NaN. Load a sound checkpoint "
                "before wrapping."
            )
    for name, tensor in host.named_parameters():
        known = is_plain(tensor) and tensor.is_floating_point() and not tensor.is_meta
        if known and not torch.isfinite(_computable(tensor).sum()):
            bad = int((~torch.isfinite(_computable(tensor))).sum())
            if bad:  # else the sum alone was too large
                raise NonFiniteWeightsError(
                    f"Parameter '{name}' of {type(host).__name__} holds {bad} values that are NaN "
                    "or inf. Load a sound checkpoint before wrapping."
                )


def _computable(tensor: Tensor) -> Tensor:
    """A tensor in a dtype that torch computes in: float8 is none."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
