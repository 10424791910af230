"""The model that `wrap` returns: the host's class, with a forward that prunes.

It has the very attribute dict of its host, so whatever is set, replaced or removed through one is
so for the other, and for other wrappers of that host. What `wrap` adds is in a slot (`Pruning`),
which no dict shows: modules it adds are children of the wrapper alone.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn

from tokenprune.errors import AlreadyWrappedError, HostError, NotWrappedError, UnsupportedHostError
from tokenprune.notices import warn_once
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.added import added_names
from tokenprune.runtime.entries import added_later, methods_of
from tokenprune.runtime.methods import call_method
from tokenprune.runtime.own_forward import OWN, forward_set, set_forward, with_forward
from tokenprune.runtime.pruning import Pruning
from tokenprune.tracing.proxy import ValueProxy

__all__ = ["PUBLIC", "PrunedModel", "as_host", "pruned_class", "pruning_of", "wrapper_of"]

PUBLIC = ("using", "set_budget", "set_keep_ratio", "set_threshold")
"""Names that a wrapped model has beside its host's."""
SHARING = ("save_pretrained", "push_to_hub")
"""Methods that a wrapped model has in the place of its host's, which they call."""
PRUNING = "_pruning"
CALL_WRAP = "Call tokenprune.wrap(model, recipe) first."
FX_TRACED = (
    "A torch.fx tracer was run on a {} that tokenprune wrapped (torch.fx.symbolic_trace, a feature "
    "extractor of torchvision or timm): its forward chooses a program by the shapes of real "
    "tensors, which such a tracer has not. Make the feature extractor of the host and wrap that, "
    'read features with a forward hook, or call tokenprune.export(model, "model.pt2") for a graph.'
)


class PrunedModel(nn.Module):
    """Mixin in front of the host's class. Made by `wrap`, never by hand."""

    __slots__ = (PRUNING,)
    _pruning: Pruning

    @property
    def _compiled_call_impl(self) -> Any:  # what `compile()` sets is not the host's
        return self._pruning.compiled if hasattr(self, PRUNING) else None

    @_compiled_call_impl.setter
    def _compiled_call_impl(self, compiled: Any) -> None:
        self._pruning.compiled = compiled

    @property
    def _modules(self) -> Any:
        if not hasattr(self, PRUNING):
            return self.__dict__["_modules"]
        return self._pruning.children

    @_modules.setter
    def _modules(self, children: dict[str, nn.Module | None]) -> None:
        self.__dict__["_modules"] = children

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
        if not hasattr(self, PRUNING):
            raise NotWrappedError(
                f"This {type(self).__name__} was made by the class of a wrapped model, which does "
                "not wrap what it makes. Call tokenprune.wrap(model, recipe) on it, or make it by "
                "the host's own class."
            )
        return self._pruning.run(self, args, kwargs, return_trace)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """torch's call of a module, which would run a forward that the host was given since."""
        if "forward" in self.__dict__ and hasattr(self, PRUNING):
            raise UnsupportedHostError(
                f"The forward of this wrapped {type(self).__name__}'s host was replaced on the "
                "host object after wrap, so nothing would be pruned. Set it on the wrapped model, "
                "or unwrap, give the host a class with that forward, and wrap again."
            )
        return super()._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks first."""
        raise HostError(
            f"torch.jit.script was given a {type(self).__name__} that tokenprune wrapped: its "
            "forward chooses a program by shapes and modes, which TorchScript cannot hold. Call "
            'tokenprune.export(model, "model.pt2"), or torch.compile(model).'
        )

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
        with self._pruning.using(path, keep_indices, generator):
            yield self

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change how many tokens are kept; nothing is traced again.

        Args:
            keep_ratio: r for r, r^2, r^3, ... over the stages, or one ratio per stage, each of the
                original patch tokens. So with `mode: bypass` too, where the published Swin models
                go down in steps instead: give `[r, r - 0.2, r - 0.4]` for those. With a threshold
                (`set_threshold`, `selection: threshold`) eval does not read the ratios; they stay
                what training aims at.

        Raises:
            PlanError: A ratio is out of (0, 1], they grow, or their number is wrong.
        """
        self._pruning.set_keep_ratio(keep_ratio)

    def set_threshold(self, threshold: float | None) -> None:
        """Choose tokens by their keep probability in eval; nothing is traced again.

        Each image then keeps what its predictor scores high, at least one token, and easy images
        cost less than hard ones. Works for any recipe; `verify` afterwards checks this path too.

        Args:
            threshold: In (0, 1): tokens with a keep probability above it stay. None goes back to
                the same number of every image, as the keep ratios say.

        Raises:
            PlanError: It is no number between 0 and 1, or the scorer gives no probabilities.
        """
        self._pruning.set_threshold(threshold)

    def set_budget(self, macs: float, *, images: Any = None, example_inputs: Any = None) -> float:
        """Keep as many tokens as a share of the dense host's MACs allows.

        The cost of predictors and matching counts. Nothing is traced again for images of the size
        that the model was wrapped with; other sizes keep the same shares of their tokens. The
        budget is saved with the model, and exported.

        Args:
            macs: In (0, 1], of the host without pruning.
            images: For a scorer whose scores are probabilities: images, or batches of them (a list,
                a DataLoader; labels are not read). Then the threshold is found with which they
                cost `macs` on average, and each image keeps what it needs. None keeps the same
                number of tokens of every image.
            example_inputs: As for `wrap`: the size of images that the budget is for; what the model
                was wrapped with if None.

        Returns:
            The share that was found: the nearest that whole tokens allow.

        Raises:
            PlanError: It is out of (0, 1], or less than this model can do (the message says how
                much it can); or no threshold reaches it. The budget is then what it was.
        """
        # counting runs this very class, so it is above it
        from tokenprune.cost.budget import budget_for, threshold_for

        pruning = pruning_of(self)
        if images is None:
            pruning.budget, share = budget_for(self, macs, example_inputs)
        else:
            pruning.budget, share = threshold_for(self, macs, images, example_inputs)
        return share

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Write the whole model to a folder: host, predictors, recipe, certificate, model card.

        `tokenprune.load(folder)` makes this model of it again; timm and transformers make the dense
        host. Where the host has a `save_pretrained` of its own, that writes the host. See
        `tokenprune.save_pretrained` for the options.
        """
        if not hasattr(self, PRUNING):
            return super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        from tokenprune.checkpoints.sharing import save_pretrained

        return save_pretrained(self, save_directory, *args, **options)

    def push_to_hub(self, repo_id: str, *args: Any, **options: Any) -> Any:
        """Upload what `save_pretrained` writes. See `tokenprune.push_to_hub` for the options."""
        if not hasattr(self, PRUNING):
            return super().push_to_hub(repo_id, *args, **options)  # type: ignore[misc]
        from tokenprune.checkpoints.sharing import push_to_hub

        return push_to_hub(self, repo_id, *args, **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a checkpoint of the host alone leaves the predictors as they are.

        The host's part is loaded by the host, which may have its own way with keys.
        """
        if not hasattr(self, PRUNING):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        names = added_names()
        own = {key: v for key, v in state_dict.items() if key.partition(".")[0] in names}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        unexpected = [key for key in own if key.partition(".")[0] not in self._modules]
        if strict and unexpected:
            mode = self._pruning.method.reduction.name
            raise RuntimeError(
                f"The weights hold {unexpected[0]!r}, which a {type(self).__name__} wrapped in "
                f"mode {mode!r} does not have: they are of another mode. Wrap the host in that "
                "mode, or pass strict=False."
            )
        found = self._pruning.host.load_state_dict(rest, strict=strict, assign=assign)
        found.unexpected_keys.extend(unexpected)
        for name in [name for name in names if own and name in self._modules]:
            part = {k.partition(".")[2]: v for k, v in own.items() if k.partition(".")[0] == name}
            result = getattr(self, name).load_state_dict(part, strict=strict, assign=assign)
            found.missing_keys.extend(f"{name}.{key}" for key in result.missing_keys)
            found.unexpected_keys.extend(f"{name}.{key}" for key in result.unexpected_keys)
        return found

    def __getattr__(self, name: str) -> Any:
        """As torch's; says so where a method that the class got after `wrap` asks for a child, and
        prunes that method from then on."""
        found = super().__getattr__(name)
        if not (isinstance(found, nn.Module) and hasattr(self, PRUNING)):
            return found
        if torch.compiler.is_compiling():
            return found
        host_class: Any = type(self._pruning.host)
        later = added_later(host_class, pruned_class(host_class))
        if later and (method := later.get(sys._getframe(1).f_code)):
            setattr(pruned_class(host_class), method, _pruned(method, getattr(host_class, method)))
            warn_once(
                self._pruning.host,
                f"added method {method}",
                f"{host_class.__name__} got {method}() after wrap, so blocks that it runs are "
                "dense in this call. It is known from now on: call it again, and it prunes.",
            )
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in added_names() and hasattr(self, PRUNING):
            self._modules[name] = value
        elif name == "forward" and hasattr(self, PRUNING):
            self.__class__ = cast(Any, with_forward(type(self), value))
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "forward" and OWN in vars(type(self)):
            self.__class__ = type(self).__mro__[1]
        else:
            super().__delattr__(name)

    def _get_name(self) -> str:
        return f"TokenPruned[{type(self).__name__}]"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if not hasattr(self, PRUNING):
            return cast(Self, copy.deepcopy(as_host(self), memo))
        memo[id(self)] = copied = cast(Self, wrapper_of(copy.deepcopy(self._pruning, memo)))
        if (given := forward_set(self)) is not None:
            copied.forward = copy.deepcopy(given, memo)  # type: ignore[method-assign]
        return copied

    def __copy__(self) -> Self:
        if not hasattr(self, PRUNING):
            return cast(Self, copy.copy(as_host(self)))
        copied = cast(Self, wrapper_of(self._pruning))
        copied.__class__ = type(self)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not hasattr(self, PRUNING):
            return as_host, (as_host(self),)
        made, given = (wrapper_of, (self._pruning,)), forward_set(self)
        return made if given is None else (*made, given, None, None, set_forward)


def _of_fx(*given: Any) -> bool:
    """Whether a torch.fx tracer stands in for any of some values; it does for `args` as a whole."""
    return any(isinstance(value, fx.Proxy) for value in given)


@cache
def pruned_class(host_class: type[nn.Module]) -> type[PrunedModel]:
    """The class of wrapped models of `host_class`: its name, its methods, our forward."""
    signature = inspect.signature(host_class.forward)
    extra = inspect.Parameter("return_trace", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    def forward(self: PrunedModel, *args: Any, **kwargs: Any) -> Any:
        whole = _of_fx(args, kwargs)  # torch.fx may hand `*args` over as one
        given = () if whole else (*args, *kwargs.values())
        if any(type(value) is ValueProxy for value in given):
            raise AlreadyWrappedError(
                f"This {type(self).__name__} is wrapped, and is a part of a model that is wrapped "
                "too. Use tokenprune.unwrap on it, or on the outer model."
            )
        if whole or _of_fx(*given):
            raise HostError(FX_TRACED.format(type(self).__name__))
        return PrunedModel.forward(self, *args, **kwargs)

    forward.__doc__ = host_class.forward.__doc__
    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters[:at], extra, *parameters[at:]]
    )
    names = {
        "__module__": host_class.__module__,
        "__doc__": host_class.__doc__,
        **{n: _pruned(n, m) for n, m in methods_of(host_class).items() if n not in SHARING},
        "forward": forward,
        **{name: property(_added(name)) for name in added_names()},
    }
    return type(host_class.__name__, (PrunedModel, host_class), names)


def _pruned(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(self: PrunedModel, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, PRUNING):
            return method(self, *args, **kwargs)
        return call_method(self._pruning, self, name, args, kwargs)

    return run


def _added(name: str) -> Callable[[PrunedModel], nn.Module]:
    def read(self: PrunedModel) -> nn.Module:
        added = self._pruning.added
        if name not in added:
            raise AttributeError(f"This {type(self).__name__} has no {name!r}.")
        return added[name]

    return read


def as_host(model: nn.Module) -> nn.Module:
    """What the class of a wrapped model made, as its host's class; any other model itself."""
    if not isinstance(model, PrunedModel) or hasattr(model, PRUNING):
        return model
    host_class = cast(type[nn.Module], type(model).__bases__[1])
    host = host_class.__new__(host_class)
    host.__dict__ = model.__dict__
    return host


def wrapper_of(pruning: Pruning) -> PrunedModel:
    """A new handle on a host: one that prunes."""
    cls = pruned_class(type(pruning.host))  # type: ignore[arg-type]
    wrapped = cls.__new__(cls)
    wrapped.__dict__ = pruning.host.__dict__
    wrapped._pruning = pruning
    return wrapped


def pruning_of(model: nn.Module) -> Pruning:
    """The pruning side of a wrapped model.

    Raises:
        NotWrappedError: `model` was not returned by `wrap`.
    """
    if not isinstance(model, PrunedModel) or not hasattr(model, PRUNING):
        named = model.named_modules() if isinstance(model, nn.Module) else ()
        held = [n for n, m in named if isinstance(m, PrunedModel) and hasattr(m, PRUNING)]
        what = f"Pass the wrapped model in it, its {held[0]!r}." if held else CALL_WRAP
        raise NotWrappedError(
            f"A model that tokenprune.wrap returned is needed, found {type(model).__name__}. {what}"
        )
    return model._pruning
