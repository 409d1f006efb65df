"""How modules are trained, probed and cached: the settings that every recipe has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from layerwise.settings.base import MOST_EPOCHS, MOST_SAMPLES, Bytes, Settings, free, later


class Optimiser(Settings):
    """Adam (Kingma & Ba 2014)."""

    learning_rate: float = Field(2e-4, gt=0, le=10, description="size of a step; no unit")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the gradients, each step")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of the squared gradients, each step")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of that mean before it divides the step")
    weight_decay: float = Field(0.0, ge=0, description="times the weight, added to its gradient")


class Training(Settings):
    """How long a stage lasts and in what arithmetic."""

    batch_size: int = Field(32, ge=1, le=MOST_SAMPLES, description="samples a step")
    loss_group: int | None = later(
        None,
        ge=1,
        le=MOST_SAMPLES,
        description="samples whose representations a loss sees at once: negatives come from the same group, and the "
        "loss of a step is the mean over its groups; null: the whole batch",
    )
    epochs: int = Field(
        300, ge=0, le=MOST_EPOCHS, description="the most epochs a module is trained; 0 leaves it as the seed makes it"
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
        description="deviation of the Gaussian noise that is added to the inputs of modules trained on frozen ones, in "
        "units of each input's own deviation; training inputs alone",
    )
    update_every: tuple[Annotated[int, Field(ge=1, le=10**6)], ...] = Field(
        (1,),
        min_length=1,
        description="steps between two updates of module 1, 2, … when all are trained together; the last "
        "number holds for the modules above",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, with float32 master weights")
    checkpoint_every: int = free(100, ge=1, le=10**9, description="steps between checkpoints within an epoch")
    keep_checkpoint: bool = free(
        True,
        description="keep the state of a finished training, about four times the bytes of its weights, so that it can "
        "go on for more epochs",
    )
    micro_batch: int | None = free(
        None, ge=1, le=MOST_SAMPLES, description="samples that go through the module at once; null: the whole batch"
    )
    checkpointing: bool = free(
        False, description="keep activations between a module's blocks only, and compute the others again"
    )
    max_memory: Bytes | None = free(
        None, ge=1, le=2**62, description="bytes of device memory a stage may take; chooses micro_batch"
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
        (1e-3,), min_length=1, description="of Adam; of several, the best on a fifth of the training samples is taken"
    )
    epochs: int = Field(300, ge=1, le=MOST_EPOCHS, description="epochs a classifier is trained")
    standardise: bool = Field(
        False,
        description="bring each feature to mean 0 and deviation 1, as of the training samples; the paper does not",
    )
    batch_size: int = Field(
        256, ge=1, le=MOST_SAMPLES, description="samples a step, or positions where each has a label"
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
        description="the probe of phones, one a position",
    )
    speaker: Probe = Field(
        Probe(learning_rates=(1e-3,), epochs=50, batch_size=64), description="the probe of speakers, one a recording"
    )

    def of(self, task: str) -> Probe:
        return self.phone if task == "phone" else self.speaker


class CacheSettings(Settings):
    """How a frozen module's outputs are stored."""

    dtype: Literal["float32", "float16", "bfloat16", "uint8"] = Field(
        "float16", description="type of the stored numbers; uint8: with a scale for each channel"
    )
    codec: Literal["none", "lz4", "zstd"] = free("lz4", description="lossless compression of the stored numbers")
    views: int = Field(1, ge=1, le=10_000, description="augmentations stored for each training sample")
    probe_splits: bool = free(
        True, description="store the labelled splits too; false: a probe computes them through the frozen modules"
    )
    url: str | None = free(
        None,
        pattern=r"^((s3|gs|az)://|file:///)[^\s/]\S*$",
        description="where caches lie instead of in the run: s3://bucket/prefix, gs://, az:// or file://",
    )
    budget: Bytes | None = free(
        None, ge=1, le=2**62, description="bytes a cache may take; null: what the disk has free, less a reserve"
    )
    window_epochs: int = free(
        5, ge=1, le=MOST_EPOCHS, description="epochs between two turns of the rolling window, where there is one"
    )
    renew: bool = free(
        False, description="a rolling window even where all samples fit, for augmentations that were never seen"
    )
