"""The model that `wrap` returns: the host's class, with a forward that prunes.

It shares the host's parameters, buffers and submodules. Everything else is in one private attribute
(`Pruning`); the class in front of the host's only forwards to it.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tokenprune.errors import HostError, NotWrappedError
from tokenprune.rewrite.settings import Path
from tokenprune.runtime.pruning import Pruning, added_names

__all__ = ["PUBLIC", "PrunedModel", "pruned_class", "pruning_of"]

PUBLIC = ("using", "set_keep_ratio", "set_threshold")
"""Names that a wrapped model has beside its host's."""
PRUNING = "_pruning"
FX_TRACED = (
    "A torch.fx tracer was run on a {} that tokenprune wrapped (torch.fx.symbolic_trace, a feature "
    "extractor of torchvision or timm): its forward chooses a program by the shapes of real "
    "tensors, which such a tracer has not. Make the feature extractor of the host and wrap that, "
    "read features with a forward hook, or use tokenprune.export(model, ...) for a graph."
)
# Not shared with the host: a module's own tables, and what compile, replicas and hooks put there.
OF_THE_OBJECT = {*vars(nn.Module()), "_compiled_call_impl", "_former_parameters", "_is_replica"}
OF_THE_OBJECT = OF_THE_OBJECT - {"training"} | {PRUNING, "forward"}


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
        return self._pruning.run(self, args, kwargs, return_trace)

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

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; a checkpoint of the host alone leaves the predictors as they are.

        The host's part is loaded by the host, which may have its own way with keys.
        """
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

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__
        own = name.startswith("__") or name in OF_THE_OBJECT or name in added_names()
        shared = PRUNING in state and "_is_replica" not in state and not own
        before = state.get(name, ...)
        super().__setattr__(name, value)
        if shared:
            setattr(self._pruning.host, name, value)  # a new head, or a mode, is the host's too
            if name != "training" and name in state and not _same(before, value):
                self._pruning.cache.clear()  # its code may have decided by it

    def _get_name(self) -> str:
        return f"TokenPruned[{type(self).__name__}]"


def _of_fx(*given: Any) -> bool:
    """Whether a torch.fx tracer stands in for any of some values; it does for `args` as a whole."""
    return any(isinstance(value, fx.Proxy) for value in given)


def _same(before: Any, after: Any) -> bool:
    plain = (bool, int, float, str, type(None), tuple)
    return before is after or (type(before) is type(after) in plain and before == after)


@cache
def pruned_class(host_class: type[nn.Module]) -> type[PrunedModel]:
    """The class of wrapped models of `host_class`: its name, its methods, our forward."""
    signature = inspect.signature(host_class.forward)
    extra = inspect.Parameter("return_trace", inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    def forward(self: PrunedModel, *args: Any, **kwargs: Any) -> Any:
        if _of_fx(args, kwargs) or _of_fx(*args, *kwargs.values()):
            raise HostError(FX_TRACED.format(type(self).__name__))
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
