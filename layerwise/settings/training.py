"""How modules are trained, probed and cached: the settings that every recipe has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from layerwise.settings.base import MOST_EPOCHS, MOST_SAMPLES, MOST_UPDATES, Bytes, JsonValue, Settings, free, later
from layerwise.settings.optimiser_kinds import (
    KINDS,
    OF_KINDS,
    OF_SCHEDULES,
    Argument,
    KindName,
    as_spelled,
    checked_arguments,
    unused,
)
from layerwise.settings.optimiser_kinds import ScheduleName as RateScheduleName

_ALWAYS_GIVEN = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")
"""Fields of `Optimiser` that have a value in every file that holds settings: null there is damage."""


class Optimiser(Settings):
    """The optimiser of a stage: one of `torch.optim` or LARS, its learning rate over time, and clipping.

    Fields that the optimiser or the schedule does not use are refused where they are set. null stands for the default.
    """

    kind: Annotated[KindName, BeforeValidator(as_spelled)] = Field(
        "Adam",
        description="Adam (Kingma & Ba 2014), another class of torch.optim, or LARS (You et al. 2017); the defaults of "
        "the other fields do not depend on it",
    )
    learning_rate: float = Field(2e-4, gt=0, le=10, description="learning rate; no unit")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the gradients, each step")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of the squared gradients, each step")
    epsilon: float = Field(1e-8, gt=0, description="added to the square root of that mean, which divides the step")
    momentum: float = Field(
        0.0, ge=0, lt=1, description="decay of the sum of the steps, each step; for SGD, RMSprop and LARS"
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="times the weight, added to its gradient; AdamW: times the learning rate, off the weight",
    )
    decay_norms_and_biases: bool = Field(
        True, description="false: no weight decay for biases and norm weights (and with LARS no rate of their own)"
    )
    arguments: dict[str, Argument | None] = Field(
        {}, description="other arguments, as torch names them: optimiser.arguments.nesterov=true"
    )
    clip_norm: float | None = Field(
        None,
        gt=0,
        description="largest norm of the gradient of a module and its objective over the whole batch; a larger one is "
        "scaled down to it",
    )
    schedule: RateScheduleName = Field(
        "constant",
        description="the learning rate over time: constant; cosine: half a cosine down (Loshchilov & Hutter 2016); "
        "step: multiplied by step_factor every step_every",
    )
    warmup: int = Field(
        0,
        ge=0,
        le=MOST_UPDATES,
        description="length of the linear warm-up (Goyal et al. 2017), in schedule_unit",
    )
    schedule_unit: Literal["epochs", "steps"] = Field(
        "epochs", description="unit of warmup, cosine_length and step_every; a step is one batch"
    )
    cosine_length: int | None = Field(
        None,
        ge=1,
        le=MOST_UPDATES,
        description="where the cosine ends, warm-up included, in schedule_unit; null: at training.epochs, and then a "
        "finished stage cannot be trained for more epochs",
    )
    cosine_end: float = Field(
        0.0, ge=0, le=1, description="fraction of the learning rate left at the end of the cosine and after it"
    )
    step_every: int = Field(
        30, ge=1, le=MOST_UPDATES, description="interval between two decreases, from the start, in schedule_unit"
    )
    step_factor: float = Field(0.1, gt=0, le=1, description="factor of each decrease")

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None or name in _ALWAYS_GIVEN}

    @field_validator(*OF_KINDS)
    @classmethod
    def _used_by_kind(cls, value: float, info: ValidationInfo) -> float:
        name, kind = info.field_name or "", info.data.get("kind")
        if kind and value != cls.model_fields[name].default and (why := unused(name, value, kind)):
            raise ValueError(why)
        return value

    @field_validator("arguments")
    @classmethod
    def _arguments_of_kind(cls, value: dict[str, Argument | None], info: ValidationInfo) -> dict[str, Argument]:
        kind = info.data.get("kind")
        return checked_arguments(kind, value) if kind else {}

    @field_validator("schedule_unit", *OF_SCHEDULES)
    @classmethod
    def _used_by_schedule(cls, value: Any, info: ValidationInfo) -> Any:
        name, schedule, warmup = info.field_name or "", info.data.get("schedule"), info.data.get("warmup")
        if value == cls.model_fields[name].default or schedule is None or warmup is None:
            return value
        needed = OF_SCHEDULES.get(name)
        if needed is None and schedule == "constant" and not warmup:
            raise ValueError(f"{value} would have no effect: the learning rate is constant. Leave it out")
        if needed not in (None, schedule):
            raise ValueError(
                f"{value} would have no effect with the schedule {schedule}. Leave it out (or null), or choose "
                f"optimiser.schedule={needed}"
            )
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.schedule == "cosine" and self.schedule_unit == "steps" and self.cosine_length is None:
            raise ValueError(
                "cosine_length is missing: with schedule_unit=steps, say after how many steps the cosine ends, as in "
                "optimiser.cosine_length=10000"
            )
        nesterov = self.arguments.get("nesterov")
        if nesterov and (self.momentum == 0 or self.arguments.get("dampening")):
            raise ValueError("arguments.nesterov = True needs optimiser.momentum above 0, and no dampening")
        return self

    def lasting(self, epochs: int) -> Self:
        """With the length of the cosine filled in, for a training of so many epochs."""
        if self.schedule != "cosine" or self.cosine_length is not None:
            return self
        return self.model_copy(update={"cosine_length": epochs})

    def identity(self, *, of_stages: bool = False) -> dict[str, JsonValue]:
        """The fields that this optimiser uses. What is switched off, and what only others use, changes no value."""
        always = {"version", "code", "learning_rate", "weight_decay", *KINDS[self.kind].fields}
        fields = type(self).model_fields
        found = {
            name: value
            for name, value in super().identity(of_stages=of_stages).items()
            if name in always or value != fields[name].get_default(call_default_factory=True)
        }
        return {**found, "kind": type(self).__name__ if self.kind == "Adam" else self.kind}


class Training(Settings):
    """Batch size, length and precision of a stage."""

    batch_size: int = Field(32, ge=1, le=MOST_SAMPLES, description="samples in a step")
    loss_group: int | None = later(
        None,
        ge=1,
        le=MOST_SAMPLES,
        description="samples whose representations a loss sees at once: negatives come from the same group, and the "
        "loss of a step is the mean over its groups; null: the whole batch",
    )
    epochs: int = Field(
        300, ge=0, le=MOST_EPOCHS, description="maximum number of epochs of a module; 0 keeps its initial weights"
    )
    patience: int = Field(
        10,
        ge=1,
        le=MOST_EPOCHS,
        description="epochs without improvement of the validation loss after which a module has converged",
    )
    tolerance: float = Field(
        1e-3, ge=0, lt=1, description="relative decrease of the validation loss that counts as improvement"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="weights that are frozen: those of the lowest validation loss (early stopping), or the last"
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of Gaussian noise added to the training inputs of modules above frozen ones, "
        "in units of each input's own standard deviation",
    )
    update_every: tuple[Annotated[int, Field(ge=1, le=10**6)], ...] = Field(
        (1,),
        min_length=1,
        description="steps between two updates of module 1, 2, … when all train together; the last "
        "number also applies to the modules above",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, with float32 master weights")
    checkpoint_every: int = free(100, ge=1, le=10**9, description="steps between checkpoints within an epoch")
    keep_checkpoint: bool = free(
        True,
        description="keep the optimiser state of a finished stage (with Adam about four times the bytes of its "
        "weights), so that it can train for more epochs",
    )
    micro_batch: int | None = free(
        None, ge=1, le=MOST_SAMPLES, description="samples that go through the module at once; null: the whole batch"
    )
    checkpointing: bool = free(
        False,
        description="activation checkpointing: keep only activations between a module's blocks, and recompute the rest",
    )
    max_memory: Bytes | None = free(
        None, ge=1, le=2**62, description="bytes of device memory a stage may use; chooses micro_batch"
    )

    @model_validator(mode="after")
    def _has_whole_groups(self) -> Training:
        if self.loss_group is not None and self.batch_size % min(self.loss_group, self.batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of loss_group {self.loss_group}, or smaller"
            )
        return self


class Probe(Settings):
    """A linear classifier on a frozen representation (paper, section 4 and appendix A).

    It reads the mean over the positions, or each position where each has a label of its own.
    """

    learning_rates: tuple[float, ...] = Field(
        (1e-3,),
        min_length=1,
        description="learning rates of Adam; if there are several, the best on a fifth of the training samples is used",
    )
    epochs: int = Field(300, ge=1, le=MOST_EPOCHS, description="epochs of a classifier")
    standardise: bool = Field(
        False,
        description="scale each feature to mean 0 and deviation 1 over the training samples; the paper does not",
    )
    batch_size: int = Field(
        256, ge=1, le=MOST_SAMPLES, description="samples in a step; positions, if each has a label of its own"
    )
    initial: Literal["uniform", "xavier"] = Field(
        "uniform", description="initial weights: torch's own, or Xavier normal"
    )

    def of(self, task: str) -> Probe:
        """The settings for one task."""
        return self


class SpeechProbes(Settings):
    """A probe for each of the two tasks on speech, as in the paper's appendix A.2."""

    phone: Probe = Field(
        Probe(learning_rates=(1e-4,), epochs=20, batch_size=1024, initial="xavier"),
        description="probe of phones; one label for each position",
    )
    speaker: Probe = Field(
        Probe(learning_rates=(1e-3,), epochs=50, batch_size=64),
        description="probe of speakers; one label for each recording",
    )

    def of(self, task: str) -> Probe:
        return self.phone if task == "phone" else self.speaker


class CacheSettings(Settings):
    """How a frozen module's outputs are stored."""

    dtype: Literal["float32", "float16", "bfloat16", "uint8"] = Field(
        "float16", description="dtype of the stored values; uint8 has a scale for each channel"
    )
    codec: Literal["none", "lz4", "zstd"] = free("lz4", description="lossless compression")
    views: int = Field(1, ge=1, le=10_000, description="augmentations stored for each training sample")
    probe_splits: bool = free(
        True, description="also store the labelled splits; false: probes recompute them through the frozen modules"
    )
    url: str | None = free(
        None,
        pattern=r"^((s3|gs|az)://|file:///)[^\s/]\S*$",
        description="address of the caches, if not in the run: s3://bucket/prefix, gs://, az:// or file://",
    )
    budget: Bytes | None = free(
        None, ge=1, le=2**62, description="bytes of disk a cache may use; null: the free space, less a reserve"
    )
    window_epochs: int = free(
        5, ge=1, le=MOST_EPOCHS, description="epochs between two refills of the rolling window, if there is one"
    )
    renew: bool = free(
        False, description="use a rolling window even if all samples fit, so that augmentations stay fresh"
    )
