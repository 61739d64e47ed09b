"""TrainConfig: everything a training run depends on, frozen, saved with the run before its first step."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from diffusion.config import (
    ClassifierConfig,
    DiffusionConfig,
    FrozenConfig,
    ModelConfig,
    SamplingDefaults,
    check_ranges,
)
from diffusion.losses import LossType
from formats.precision import TrainingPrecision
from trainer.data.options import DataConfig

TimestepSamplerName = Literal["uniform", "stratified", "loss_second_moment"]
LrSchedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]
EmaDecay = Annotated[float, Field(ge=0, lt=1)]
SigmaRel = Annotated[float, Field(gt=0, lt=0.288)]

MAY_CHANGE_ON_RESUME = frozenset(
    {
        *("total_images", "checkpoint_every_images", "keep_checkpoints", "log_every_batches"),
        *("preview_per_class", "preview_steps", "sampling", "tensorboard"),
        *("lr", "lr_warmup_images", "lr_schedule", "lr_decay_images", "weight_decay", "grad_clip", "max_rollbacks"),
        *("precision", "microbatch_size", "channels_last", "compile", "use_checkpoint"),
        *("validation_every_images", "stop_after_worse", "data.workers", "data.unreadable"),
    }
)
"""Fields that a resumed run may change; its checkpoints record the changes. Any other change is refused.

The fields in the first two lines do not affect training, except that most learning-rate schedules end at total_images.
The others allow a run to continue after it diverged, ran out of memory, or met an image that cannot be read: that one
is replaced, and the order of all others stays. Images that are left out at the start are other data.
"""


def _kind(model: Any) -> str:
    """Return which network a configuration, or its fields, describes."""
    return (
        "classifier" if isinstance(model, ClassifierConfig) or (isinstance(model, dict) and "pool" in model) else "unet"
    )


class TrainConfig(FrozenConfig):
    """A training run. Durations count *images*, so that changing the batch size does not change their meaning."""

    model: Annotated[
        Annotated[ModelConfig, Tag("unet")] | Annotated[ClassifierConfig, Tag("classifier")], Discriminator(_kind)
    ]
    """The network, a UNet or a noisy classifier; num_classes and null_class are filled in from the data."""
    diffusion: DiffusionConfig = DiffusionConfig(rescale_timesteps=True)
    class_conditional: bool = True
    """Whether labels are used."""
    label_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Fraction of labels replaced by the null class, for classifier-free guidance; 0: none."""

    loss: LossType | Literal["cross_entropy"] = "hybrid"
    """`hybrid` is L_hybrid (paper, Equation 16), `vlb` L_vlb, `simple` L_simple; `cross_entropy` is a classifier's."""
    rescale_vlb: bool = True
    """Scale the bound's terms to the bound of the entire chain: with `hybrid`, lambda = 0.001 on L_vlb."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Weight the prediction's loss by min(SNR, gamma) / SNR (arXiv:2303.09556; 5 is usual); None: no weights."""
    timestep_sampler: TimestepSamplerName = "uniform"
    """How timesteps are drawn: `uniform`; `stratified`, evenly over each batch; or `loss_second_moment`, the importance
    sampling of L_vlb (paper, section 3.3)."""

    total_images: int = Field(ge=1)
    """Training images after which the run ends, repetitions included."""
    batch_size: int = Field(default=128, ge=1)
    """Images per step, of all processes together."""
    microbatch_size: int | None = Field(default=None, ge=1)
    """Images per forward pass of a process; None: all of its images. Gradients are averaged over the batch."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate of AdamW, after the warm-up."""
    lr_warmup_images: int = Field(default=0, ge=0)
    """The learning rate rises linearly over this many images."""
    lr_schedule: LrSchedule = "constant"
    """Learning-rate schedule after the warm-up.

    `linear` and `cosine` fall to zero at total_images. `inverse_sqrt` falls as sqrt(lr_decay_images / images) after
    lr_decay_images (the decay of arXiv:2312.02696), independently of total_images: for runs whose length is not known.
    """
    lr_decay_images: int = Field(default=100_000, ge=1)
    """Images after which `inverse_sqrt` starts to fall; other schedules ignore it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Maximum norm of the gradient; None: no limit."""
    max_rollbacks: int = Field(default=0, ge=0)
    """How often a run that has diverged returns to its newest checkpoint by itself; 0: it ends with an error.

    Each time it skips the images trained since that checkpoint, and halves the learning rate for the rest of the run.
    """
    ema_decay: tuple[EmaDecay, ...] = Field(default=(0.9999,), min_length=1)
    """Decays of averages of the weights, per optimiser step; the average with the first one is the model.

    With several, each checkpoint leaves a snapshot of all of them, from which `iddpm ema` writes models.
    """
    ema_warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at step n, so that early averages forget the initial weights."""
    ema_sigma_rels: tuple[SigmaRel, ...] = ()
    """Relative widths of additional power-function averages, e.g. [0.05, 0.1].

    From their snapshots, one per checkpoint, `iddpm ema` computes an average of any width after the run.
    """
    data: DataConfig = DataConfig()
    """How images are read."""
    horizontal_flip: bool = False
    """Mirror images at random."""
    precision: TrainingPrecision = "auto"
    """Autocast precision; `auto` is bfloat16 if the machine supports it, else float32.

    `float16` scales the loss so that small gradients do not vanish, and skips steps in which a gradient overflows.
    """
    channels_last: bool = False
    """Store feature maps with channels last, which convolutions on GPUs prefer in low precision."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, faster steps on GPUs."""
    use_checkpoint: bool = False
    """Keep only the inputs of residual and attention blocks and compute them again in the backward pass: the same
    gradients with much less memory, for about a third more time."""
    seed: int = Field(default=0, ge=0, lt=2**53)
    """Determines initial weights, order of images, timesteps, noise, dropped labels, flips, crops, held-out images."""

    sampling: SamplingDefaults = SamplingDefaults()
    """Recommended sampling options; stored in the model's config.json."""

    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Part of the data that is held out, at least one image if not 0; their loss shows overfitting (appendix G). 0 with
    held-out data in a data set of their own."""
    validation_images: int = Field(default=1000, ge=1)
    """Held-out images that are used at most."""
    validation_every_images: int = Field(default=1_000_000, ge=1)
    """The loss of the averaged weights on held-out images is logged after every so many training images."""
    stop_after_worse: int | None = Field(default=None, ge=1)
    """Early stopping: the run ends after this many validations in a row that were not better than the best one."""

    checkpoint_every_images: int = Field(default=1_000_000, ge=1)
    """A checkpoint, with a sample grid, is written after every so many training images, and at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; older ones are deleted."""
    log_every_batches: int = Field(default=50, ge=1)
    """A line of means is written to `metrics.jsonl` after every so many batches."""
    preview_per_class: int = Field(default=2, ge=0)
    """Images per row of the sample grid at each checkpoint; 0: no grid.

    The grid has a row per class, or ten: for ten classes spread evenly over all, or without classes."""
    preview_steps: int = Field(default=25, ge=2)
    """Respaced steps of the sample grid."""
    tensorboard: bool = False
    """Also write the log lines and sample grids for TensorBoard, into the run's folder `tensorboard/`."""

    @field_validator("ema_decay", mode="before")
    @classmethod
    def _list_decays(cls, value: Any) -> Any:
        """Accept a number, which earlier versions recorded."""
        return (value,) if isinstance(value, (int, float)) else value

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(f"microbatch_size must divide batch_size ({self.batch_size}); got {self.microbatch_size}")
        if (self.loss == "cross_entropy") != isinstance(self.model, ClassifierConfig):
            raise ValueError(
                f"loss 'cross_entropy' is the only one of a classifier, and of no other network; the model is a "
                f"{type(self.model).__name__}, loss is '{self.loss}'"
            )
        if self.loss == "hybrid" and not self.diffusion.learns_variance:
            raise ValueError(
                f"loss 'hybrid' needs a learned variance; diffusion.variance is '{self.diffusion.variance}'"
            )
        if self.loss == "simple" and self.diffusion.learns_variance:
            raise ValueError(
                "loss 'simple' would leave the learned variance untrained: set loss 'hybrid', or diffusion.variance "
                "'fixed_large' or 'fixed_small'"
            )
        if isinstance(self.model, ClassifierConfig) and not self.class_conditional:
            raise ValueError("class_conditional must be true for a classifier, which is trained on labels")
        if len(set(self.ema_decay)) < len(self.ema_decay):
            raise ValueError(f"ema_decay must list each decay once; got {', '.join(map(str, self.ema_decay))}")
        if self.preview_steps > self.diffusion.num_timesteps:
            raise ValueError(f"preview_steps must be at most num_timesteps; got {self.preview_steps}")
        return self

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        channels = self.cond_channels
        if self.data.value_range is not None:
            check_ranges("data.value_range", self.data.value_range, self.model.image_channels)
        if channels == 0:
            for name in ("cond_range", "cond_column"):
                if getattr(self.data, name) is not None:
                    raise ValueError(f"data.{name} needs model.cond_channels; got {getattr(self.data, name)}")
        elif self.data.cond_range is not None:
            check_ranges("data.cond_range", self.data.cond_range, channels)
        return self

    @property
    def cond_channels(self) -> int:
        """Channels of the conditioning images that the data must have; 0: none."""
        return self.model.cond_channels if isinstance(self.model, ModelConfig) else 0

    def with_overrides(self, assignments: dict[str, Any]) -> Self:
        """Return a validated copy with fields set by dotted name, e.g. {"model.dropout": 0.1}.

        Raises:
            ValueError: unknown name (the message lists the allowed ones) or invalid value.
        """
        values = self.model_dump()
        for name, value in assignments.items():
            *parents, leaf = name.split(".")
            node: Any = values
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if not isinstance(node, dict) or leaf not in node:
                allowed = node if isinstance(node, dict) else values
                raise ValueError(
                    f"unknown field {name!r}; allowed here: {', '.join(sorted(allowed))}. `iddpm train --fields` "
                    "describes them"
                )
            is_list = isinstance(node[leaf], tuple)
            node[leaf] = [value] if is_list and not isinstance(value, list) else value
        if "model.attention_resolutions" not in assignments:
            self._refuse_lost_attention(values)
        return type(self).model_validate(values)

    def _refuse_lost_attention(self, values: dict[str, Any]) -> None:
        """Refuse a network without the levels that have attention here, and name the setting that keeps it there."""
        try:
            now = type(self.model).model_validate({**values["model"], "attention_resolutions": []})
        except ValidationError:
            return  # the validation of all fields reports it
        attended, sizes = self.model.attention_resolutions, now.level_sizes
        if set(attended) <= set(sizes):
            return
        depths = [self.model.level_sizes.index(size) for size in attended]
        kept = [sizes[depth] for depth in depths if depth < len(sizes)] or [sizes[-1]]
        raise ValueError(
            f"model.attention_resolutions is {list(attended)}, and the levels of this network are {list(sizes)} pixels "
            f"high: add --set model.attention_resolutions={','.join(map(str, kept))} for attention at the same levels, "
            "or choose others"
        )

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Return the fields that differ from another configuration, by dotted name: (its value, the value here)."""
        mine, theirs = flat(self.model_dump(mode="json")), flat(other.model_dump(mode="json"))
        return {name: (theirs[name], mine[name]) for name in mine if mine[name] != theirs[name]}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields by dotted name."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
