"""What each image of a batch cost, where images keep different numbers of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenprune.analysis.plan import Budget
from tokenprune.cost.profile import Profiler
from tokenprune.errors import PlanError
from tokenprune.hosts.inputs import ExampleInputs
from tokenprune.rewrite.kept.pruning_trace import PruningTrace

__all__ = ["ImageMacs"]


class ImageMacs:
    """MACs of an image as a function of how many tokens it keeps.

    The cost is a constant and, for each stage, a polynomial of degree two in the tokens that the
    stage keeps: linear layers are linear in them, attention is quadratic. So a few counted profiles
    give the exact cost at every count. It is the cost of an image that runs alone: the padding of a
    batch is not counted.

        costs = ImageMacs(model)
        output, trace = model(images, return_trace=True)
        print(costs(trace).mean() / 1e9, "GMACs an image")
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None = None) -> None:
        """Count the profiles; nothing is computed.

        Args:
            model: What `wrap` returned.
            example_inputs: As for `wrap`; what the model was wrapped with if None.

        Raises:
            NotWrappedError: `model` is not wrapped.
            PlanError: It has fewer than four patch tokens at a stage.
        """
        profiler = Profiler(model, example_inputs)
        now = profiler()
        self.dense, self.patches = now.dense_macs, now.patches_per_stage
        patches = self.patches
        if min(patches) < 4:
            raise PlanError(
                f"asked what images cost at each count; {now.host} has {min(patches)} patch tokens "
                "at a stage, and four are needed. Use larger images."
            )
        low, high = [1] * len(patches), [n - 1 for n in patches]

        def cost(counts: Sequence[int]) -> float:
            shares = tuple(k / n for k, n in zip(counts, patches, strict=True))
            budget = Budget(shares, rounding="round")
            return float(profiler(budget).macs)

        self._points: list[tuple[int, int, int]] = []
        self._steps: list[tuple[float, float]] = []
        before = self._least = cost(low)
        for s, (least, most) in enumerate(zip(low, high, strict=True)):
            middle = (least + most) // 2
            # earlier stages at their most, later ones at their least: sets are nested
            halfway, full = (cost([*high[:s], k, *low[s + 1 :]]) for k in (middle, most))
            self._points.append((least, middle, most))
            self._steps.append((halfway - before, full - before))
            before = full

    def __call__(self, kept: PruningTrace | Tensor) -> Tensor:
        """MACs of images.

        Args:
            kept: The trace of a call, or [B, S] numbers of kept patch tokens after each stage.

        Returns:
            [B] float64.
        """
        if isinstance(kept, PruningTrace):
            kept = torch.stack([stage.decision.sum(1) for stage in kept.stages], dim=1)
        counts = kept.detach().double().cpu()
        total = torch.full(counts.shape[:1], self._least, dtype=torch.float64)
        for x, (a, b, c), (at_b, at_c) in zip(
            counts.unbind(1), self._points, self._steps, strict=True
        ):  # Lagrange's polynomial through (a, 0), (b, at_b) and (c, at_c)
            total += at_b * (x - a) * (x - c) / ((b - a) * (b - c))
            total += at_c * (x - a) * (x - b) / ((c - a) * (c - b))
        return total
