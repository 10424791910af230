"""The sections of a recipe: plain, checked, immutable data.

A value of the wrong type is an error, never converted; so is a key that no section knows. The
defaults of `predictor`, `sampling`, `loss` and of the optimiser are DynamicViT's; augmentation and
weight averaging are off unless a recipe asks for them.
"""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tokenprune.recipe.counting import Rounding

__all__ = [
    "HostSection",
    "LossSection",
    "PredictorSection",
    "SamplingSection",
    "ScheduleSection",
    "Section",
    "Stage",
    "Stages",
    "TrainSection",
    "falling_shares",
]

RUNS_CODE = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "code_revision",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "token",
        "trust_remote_code",
    }
)
_Ratio = Annotated[float, Field(gt=0, le=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Block = Annotated[int, Field(ge=0)]
_Weight = Annotated[float, Field(ge=0)]


def _plain(value: Any) -> Any:
    for item in value if isinstance(value, list) else [value]:
        finite = not isinstance(item, float) or math.isfinite(item)
        if not (item is None or isinstance(item, bool | int | float | str)) or not finite:
            raise ValueError(
                "should be a finite number, a text, true, false, null or a list of these, "
                f"found {type(item).__name__}"
            )
    return value


def _check_crop_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[0] > scale[1]:
        raise ValueError(f"{scale[0]} is larger than {scale[1]}; the smaller share comes first")
    return scale


def _check_blocks(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Raise ValueError unless there is a block and the blocks are strictly increasing."""
    if not blocks:
        raise ValueError("there is no stage; give at least one block")
    for earlier, later in pairwise(blocks):
        if later == earlier:
            raise ValueError(f"two stages are at block {later}; leave one of them out")
        if later < earlier:
            raise ValueError(f"block {later} comes after block {earlier}; order stages by block")
    return blocks


def _no_code(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for what makes a library run code, unpickle a file or go to a network."""
    refused = sorted(RUNS_CODE & kwargs.keys())
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: a recipe may come from somebody else, so it names no code to "
            "run and no file to read. Leave it out; build such a host yourself and pass it to "
            "tokenprune.wrap or tokenprune.load"
        )
    return kwargs


_Plain = Annotated[Any, AfterValidator(_plain)]
_CropScale = Annotated[
    tuple[_Ratio, _Ratio], Field(strict=False), AfterValidator(_check_crop_scale)
]
_Blocks = Annotated[tuple[_Block, ...], Field(strict=False), AfterValidator(_check_blocks)]


class Section(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Stage(Section):
    """One pruning point.

    Attributes:
        block: the stage runs before this block, counted from 0 over the whole host.
        keep_ratio: kept share of the original patch tokens, in (0, 1].
    """

    block: _Block
    keep_ratio: _Ratio


def _check_stages(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Raise ValueError unless blocks are strictly increasing and ratios do not grow."""
    _check_blocks(tuple(stage.block for stage in stages))
    for earlier, later in pairwise(stages):
        if later.keep_ratio > earlier.keep_ratio:
            raise ValueError(
                f"keep_ratio grows from {earlier.keep_ratio} at block {earlier.block} to "
                f"{later.keep_ratio} at block {later.block}; it is the share of the original "
                "tokens, so it must not grow"
            )
    return stages


Stages = Annotated[tuple[Stage, ...], Field(strict=False), AfterValidator(_check_stages)]


class ScheduleSection(Section):
    """Stages by a rule; give one of `keep_ratio` and `r`.

    Attributes:
        blocks: where the stages stand, strictly increasing. Left out, `wrap` puts three stages at
            a quarter, a half and three quarters of the host's blocks; with `r` or `falling`, one
            at every block.
        keep_ratio: each stage keeps this share of what the stage before kept: q, q^2, q^3, ...
        falling: with `keep_ratio` q and no `blocks`, q^3 of the tokens are left in the end, and the
            number that leaves at a block falls evenly to 0 in the last one.
        r: how many tokens leave at each stage, of the image size that the host is wrapped with;
            half of those that are there at most (ToMe).
    """

    blocks: _Blocks | None = None
    keep_ratio: _Ratio | None = None
    falling: bool = False
    r: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.keep_ratio is None) == (self.r is None):
            raise ValueError("give exactly one of `keep_ratio` and `r`")
        if self.falling and (self.r is not None or self.blocks is not None):
            raise ValueError("`falling` goes with `keep_ratio` alone, without `blocks`")
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages written out; none if the host decides where they are, or how many leave."""
        if self.keep_ratio is None or self.blocks is None:
            return ()
        return tuple(
            # twelve digits: 0.7 ** 2 is 0.48999999999999994, and a recipe means 0.49
            Stage(block=block, keep_ratio=float(f"{self.keep_ratio ** (index + 1):.12g}"))
            for index, block in enumerate(self.blocks)
        )

    def ratios(self, stages: int, patches: int) -> tuple[float, ...]:
        """Kept share of `patches` tokens after each stage, where the blocks of `r` or `falling` are
        known: ValueError if `r` tokens cannot leave the first."""
        if self.r is None:
            return falling_shares(self.keep_ratio or 1.0, stages)
        if self.r > patches // 2:
            raise ValueError(
                f"`r: {self.r}` tokens cannot leave {patches} at once; half of them can, "
                f"{patches // 2}"
            )
        left = [patches]
        for _ in range(stages):
            left.append(left[-1] - min(self.r, left[-1] // 2))
        return tuple(float(f"{count / patches:.12g}") for count in left[1:])


def falling_shares(keep_ratio: float, stages: int) -> tuple[float, ...]:
    """Shares that are left after each stage, q^3 in the end: what leaves falls evenly to 0."""
    weights = [stages - 1.0 - stage for stage in range(stages)] if stages > 1 else [1.0]
    kept, shares = 1.0, []
    for weight in weights:
        kept -= (1 - keep_ratio**3) * weight / sum(weights)
        shares.append(float(f"{kept:.12g}"))
    return tuple(shares)


class PredictorSection(Section):
    """The keep / drop predictor (DynamicViT, section 3.2): half local, half global features.

    Attributes:
        activation: between its linear layers.
    """

    activation: Literal["gelu", "relu", "silu"] = "gelu"


class SamplingSection(Section):
    """How decisions are drawn in training and tokens are chosen in eval.

    Attributes:
        temperature: of the Gumbel-softmax.
        hard: 0/1 decisions with a straight-through gradient; otherwise soft ones.
        counts: how many tokens training keeps: `free` decides about each token, and the ratio loss
            holds the mean (DynamicViT); `fixed` keeps as many as eval will, those with the best
            scores after noise, and there is no ratio loss. With a threshold they are free.
        noise: of the scores: `random` is Gumbel noise in training and none in eval (DynamicViT);
            `spread` is the same in every call, training or eval, and evenly spread over the tokens;
            with fixed counts or a threshold training keeps what eval keeps. Better where predictors
            learn for a short time.
        rounding: how `N * keep_ratio` of the original N becomes a count; see `num_keep`.
        selection: `topk` keeps the same number of tokens of every image; `threshold` keeps the
            tokens above a keep probability, so counts differ between images. `keep_ratio` is then
            the target of training; with `loss.ratio_per_image: false` for the batch mean.
        threshold: with `selection: threshold`, keep probability above which a token is kept; the
            best token of an image is always kept.
        buckets: has no meaning any more; recipes of older versions name it.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    hard: bool = True
    counts: Literal["free", "fixed"] = "free"
    noise: Literal["random", "spread"] = "random"
    rounding: Rounding = "floor"
    selection: Literal["topk", "threshold"] = "topk"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    buckets: Annotated[int, Field(ge=1)] = 4


class LossSection(Section):
    """Weights of the loss parts (DynamicViT, section 3.3), and the sets that they average over.

    Attributes:
        classification: weight of the cross entropy.
        ratio: weight of the mean over stages of (kept share - keep_ratio)^2.
        distill_logits: weight of KL(student, teacher) of the class logits.
        distill_tokens: weight of the distance between the final tokens and the teacher's.
        ratio_per_image: square each image's own kept share, not the batch's mean share.
        token_distance: `mse`, or `kl` where the final tokens are logits (LV-ViT's dense head).
        token_set: `kept` compares the tokens that the last stage kept; `all` every token, for
            `bypass`, where dropped tokens stay.
    """

    classification: _Weight = 1.0
    ratio: _Weight = 2.0
    distill_logits: _Weight = 0.5
    distill_tokens: _Weight = 0.5
    ratio_per_image: bool = True
    token_distance: Literal["mse", "kl"] = "mse"
    token_set: Literal["kept", "all"] = "kept"


class TrainSection(Section):
    """Settings of `tokenprune train`.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes and accumulation steps.
        learning_rate: peak rate of new parameters (predictors, light branches); a cosine follows
            the warm-up.
        min_learning_rate: the rate at the end of the cosine.
        backbone_lr_scale: the host's own parameters get `learning_rate` times this.
        frozen_epochs: first epochs, in which the host's own parameters are not trained.
        frozen_parameters: host parameters whose name contains one of these are never trained.
        weight_decay: of AdamW; biases and one-dimensional parameters get none.
        warmup_epochs: epochs over which the rate grows linearly from 0.
        drop_path: stochastic depth of the host.
        mixup: alpha, 0 = off.
        cutmix: alpha, 0 = off.
        label_smoothing: share of the target spread over all classes.
        random_erasing: probability per image.
        rand_augment: policy in timm's notation, such as `rand-m9-mstd0.5-inc1`; null = off.
        color_jitter: strength; 0 = off. timm ignores it where `rand_augment` is on.
        crop_scale: smallest and largest share of the area in a random crop; null = 0.08 to 1, and
            0.6 to 1 for digits and idx files.
        ema_decay: of the weight average; null = off.
        clip_grad: largest gradient norm; null = off.
        mixed_precision: `no`, `bf16` or `fp16`.
        image_size: side in pixels; null = the host's default.
        seed: of weights, data order and noise.
    """

    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1)] = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    backbone_lr_scale: Annotated[float, Field(ge=0)] = 0.01
    frozen_epochs: Annotated[int, Field(ge=0)] = 5
    frozen_parameters: Annotated[tuple[str, ...], Field(strict=False)] = ()
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    random_erasing: _Share = 0.0
    rand_augment: Annotated[str, Field(pattern=r"^rand(-[a-z]+[0-9.]+)+$")] | None = None
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    crop_scale: _CropScale | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    image_size: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class HostSection(Section):
    """The host of a recipe; the command line builds it, `wrap` ignores it.

    Attributes:
        library: where the model comes from.
        model: timm's model name, or the transformers checkpoint or model type.
        kwargs: for building the model; none that makes a library run code or read a file.
    """

    library: Literal["timm", "transformers"]
    model: Annotated[str, Field(min_length=1)]
    kwargs: Annotated[dict[str, _Plain], AfterValidator(_no_code)] = Field(default_factory=dict)
