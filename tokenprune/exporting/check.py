"""Compare an exported file with its model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import ExportError
from tokenprune.exporting.run import Run, batched_inputs, named_tensors
from tokenprune.hosts.inputs import first_floating
from tokenprune.runtime.difference import TOLERANCE
from tokenprune.runtime.model import pruning_of
from tokenprune.tracing.arguments import Arguments, as_arguments

__all__ = ["compare", "margins"]

ROUNDS = 8
CLOSE = (
    " Rounding may choose other tokens there: only {:.1e} in log-probability is between the last "
    "kept and the first dropped one. Pass example_inputs= of real images, or check=False."
)


def compare(
    model: nn.Module,
    run: Run,
    given: Arguments | Mapping[str, Any],
    batch_sizes: Sequence[int],
    name: str,
) -> tuple[float, float]:
    """Run both on fresh inputs of several batch sizes.

    A file rounds differently from the model, so where the last kept and the first dropped token
    have nearly equal scores it may keep the other one. Therefore inputs with wide `margins` in the
    model are chosen before the file runs; on these every image must agree.

    Returns:
        The largest difference found and the largest that rounding may cause in the model's dtype,
        relative to the scale of each output.
    """
    example = as_arguments(type(model).__name__, given)
    dtype = first_floating(model).dtype
    allowed = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for batch_size in batch_sizes:
        inputs, margin = _wide_inputs(model, example, batch_size, allowed / 10, generator)
        wanted, found = named_tensors(inputs.call(model)), run(inputs)
        if wanted.keys() != found.keys():
            raise ExportError(
                f"{name!r} returns {', '.join(found)}; the model returns {', '.join(wanted)}. "
                "Nothing was written. Give the outputs names of their own (a dict or a dataclass)."
            )
        for output, value in wanted.items():
            error = _difference(value, found[output], batch_size)
            worst = int(error.argmax())
            largest = max(largest, float(error[worst]))
            if not error[worst] <= allowed:
                message = (
                    f"{name!r} does not compute what {type(model).__name__} does: at batch size "
                    f"{batch_size} output '{output}' is off by {error[worst]:.1e} of its scale, "
                    f"and rounding may cause {allowed:.0e}. Nothing was written."
                )
                gap = float(margin.min() if len(error) == 1 else margin[worst])
                raise ExportError(message if gap >= allowed / 10 else message + CLOSE.format(gap))
    return largest, allowed


def margins(model: nn.Module, inputs: Arguments | Mapping[str, Any]) -> Tensor:
    """How much the scores of each image must change before other tokens are kept: [B].

    It is the smallest gap, over the stages, between the scores of the last kept and the first
    dropped token, in log-probability; inf where nothing is dropped.
    """
    given = as_arguments(type(model).__name__, inputs)
    starts = pruning_of(model).programs(given).starts
    _, trace = given.call(model, return_trace=True)
    batch_size = len(next(iter(batched_inputs(inputs).values())))
    least = torch.full((batch_size,), float("inf"), device="cpu")
    present = trace.real
    for number, stage in enumerate(trace.stages):
        present = trace.real if number in starts else present
        score, kept = stage.keep_logits[..., 0].float(), stage.decision > 0.5
        choice = torch.ones_like(kept) if present is None else present
        last = score.masked_fill(~(kept & choice), float("inf")).amin(dim=1)
        first = score.masked_fill(kept | ~choice, float("-inf")).amax(dim=1)
        least = torch.minimum(least, (last - first).cpu())
        present = choice & kept
    return least


def _wide_inputs(
    model: nn.Module,
    example: Arguments,
    batch_size: int,
    enough: float,
    generator: torch.Generator,
) -> tuple[Arguments, Tensor]:
    """The inputs with the widest margins among several batches, and those margins [B]."""
    drawn: list[Arguments] = []
    margin = torch.empty(0, device="cpu")
    for _ in range(ROUNDS):
        drawn.append(_draw(model, example, batch_size, generator))
        margin = torch.cat([margin, margins(model, drawn[-1])])
        if int((margin >= enough).sum()) >= batch_size:
            break
    widest = margin.topk(batch_size).indices
    pool = {n: torch.cat([inputs[n] for inputs in drawn]) for n in batched_inputs(example)}
    chosen = {name: rows[widest.to(rows.device)] for name, rows in pool.items()}
    return example.with_tensors(chosen), margin[widest]


def _draw(
    model: nn.Module, example: Arguments, batch_size: int, generator: torch.Generator
) -> Arguments:
    """Inputs like the example: floats of its mean and deviation, token ids, else rows of it."""
    known = pruning_of(model).spec.inputs
    drawn: dict[str, Tensor] = {}
    for name, like in batched_inputs(example).items():
        shape = (batch_size, *like.shape[1:])
        high = known[name].high if name in known else None
        if like.is_floating_point():
            spread, mean = torch.std_mean(like.double().cpu())
            value = torch.randn(shape, generator=generator, device="cpu") * spread + mean
        elif high is not None:
            value = torch.randint(0, high, shape, generator=generator, device="cpu")
        else:
            rows = torch.randint(0, len(like), (batch_size,), generator=generator, device="cpu")
            value = like.cpu()[rows]
        drawn[name] = value.to(like.device, like.dtype)
    return example.with_tensors(drawn)


def _difference(wanted: Tensor, found: Tensor, batch_size: int) -> Tensor:
    """Largest difference in each image, [B], or of all, [1], relative to the scale of `wanted`."""
    images = batch_size if wanted.ndim and wanted.shape[0] == batch_size else 1
    if wanted.shape != found.shape:
        return torch.full((images,), float("inf"))
    one, other = wanted.double().cpu(), found.double().cpu()
    scale = one[one.isfinite()].abs().amax() if one.isfinite().any() else one.new_zeros(())
    same = (one == other) | (one.isnan() & other.isnan())
    error = torch.where(same, 0.0, (one - other).abs() / (scale if scale > 0 else 1.0))
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).reshape(images, -1).amax(dim=1)
