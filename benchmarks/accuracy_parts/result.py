"""A training of `benchmarks.accuracy` and its result."""

from dataclasses import dataclass

__all__ = ["Result", "Task"]


@dataclass(frozen=True, order=True)
class Task:
    """One training.

    Attributes:
        seed: of weights, order and noise.
        arm: `dense`, `dense longer`, or one of `ARMS`.
        keep_ratio: base ratio r; the stages keep r, r^2, r^3. 1 for the dense ones.
    """

    seed: int
    arm: str
    keep_ratio: float

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"seed{self.seed}-{self.arm.replace(' ', '-')}-{self.keep_ratio}"


@dataclass(frozen=True)
class Result:
    """Result of a training.

    Attributes:
        seed: as in `Task`.
        arm: as in `Task`.
        keep_ratio: as in `Task`.
        accuracy: share of correct ones among the 10,000 test images, on the gather path.
        gmacs: of one image.
        tokens: patch tokens after each stage.
        epochs: of this training.
        images: trained on.
        minutes: of this training and its evaluation.
    """

    seed: int
    arm: str
    keep_ratio: float
    accuracy: float
    gmacs: float
    tokens: tuple[int, ...]
    epochs: int
    images: int
    minutes: float

    @property
    def task(self) -> Task:
        """The training of this result."""
        return Task(self.seed, self.arm, self.keep_ratio)
