"""What to train, on what, and how: frozen, validated settings. A recipe only chooses.

A `Recipe` names one dataset, one network, one objective, and the numbers of the training. Datasets, networks and
objectives are settings too, each defined beside the code it configures; this file holds what they share and imports
none of them, so that reading a recipe's form never imports torch.

Fields marked with `free()` cannot change any computed value (where data lie, how many samples share a file, …). They
stay out of `identity`, on which the validity of stages and caches rests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny

from layerwise.choices import FeedName, ScheduleName
from layerwise.choices import MethodName as MethodName
from layerwise.errors import RecipeError
from layerwise.progress import SILENT, Progress
from layerwise.sources import NoSource, code_of
from layerwise.units import parse_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from layerwise.data.dataset import Splits
    from layerwise.nets.module import Module
    from layerwise.objectives.objective import Objective

JsonValue = Any
Shape = tuple[int, ...]
Bytes = Annotated[int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value)]


def free(default: Any, **constraints: Any) -> Any:
    """A field that cannot change any computed value, and so does not make a stage or a cache stale."""
    return Field(default, json_schema_extra={"changes_values": False}, **constraints)


def labelled_only(default: Any, **constraints: Any) -> Any:
    """A field that only says which labelled samples probes see, or where their labels are, and so does not make a stage
    stale: a stage depends on the contents of the splits that it reads, which its identity holds besides.
    """
    return Field(default, json_schema_extra={"changes_stages": False}, **constraints)


class Settings(BaseModel):
    """Frozen and validated; an unknown field is an error.

    Settings of your own bring code along, on which results depend as much as on the fields. Their identity holds a
    digest of the source of the file that defines the class, and of the local files that this one imports, as it is
    when the class is defined: edit a loss, a forward pass or a transform there and what was made with it is stale.
    Comments, docstrings and formatting do not count. Not seen are what is installed as a package (but for the file that
    defines the class, and the package's version), what is imported by a computed name, and data files that the code
    reads. Where such a thing changes results, and for classes that were typed into a shell or a notebook, state a
    version and change it with every edit:

        class MyLoss(ObjectiveSettings):
            version = 2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: ClassVar[int | str | None] = None
    """Part of the identity, where it is set."""
    _code: ClassVar[str | NoSource | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        try:
            cls._code = code_of(cls)
        except NoSource as error:
            cls._code = error

    @classmethod
    def code(cls) -> dict[str, JsonValue]:
        """What identifies the code of a class that is not part of layerwise, by itself; empty for one that is.

        Raises:
            RecipeError: the source cannot be read, and the class states no version.
        """
        if isinstance(cls._code, NoSource) and cls.version is None:
            raise RecipeError(
                f"{cls._code}, so that an edit of its code would not be noticed. Define it in a file; or state a "
                "version in the class, version = 1, and change it with every edit"
            )
        found = {"code": cls._code if isinstance(cls._code, str) else None, "version": cls.version}
        return {name: value for name, value in found.items() if value is not None}

    def identity(self, *, of_stages: bool = False) -> dict[str, JsonValue]:
        """The fields that can change a computed value, as JSON; nested settings likewise, with the name of their
        kind, and a digest of the code of those that are not part of layerwise.

        Args:
            of_stages: without those that can only change what probes see.
        """
        found: dict[str, JsonValue] = {"kind": type(self).__name__, **self.code()}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("changes_values") is False:
                continue
            if of_stages and isinstance(extra, dict) and extra.get("changes_stages") is False:
                continue
            found[name] = self._as_json(getattr(self, name), of_stages)
        return found

    @staticmethod
    def _as_json(value: object, of_stages: bool) -> JsonValue:
        if isinstance(value, tuple):
            return [Settings._as_json(item, of_stages) for item in value]
        return value.identity(of_stages=of_stages) if isinstance(value, Settings) else value


def codes(value: object, path: str = "") -> dict[str, JsonValue]:
    """`Settings.code` of each class within some settings that is not part of layerwise, by the path of its field."""
    if isinstance(value, tuple):
        inner = {str(index): item for index, item in enumerate(value)}
        found: dict[str, JsonValue] = {}
    elif isinstance(value, Settings):
        inner = {name: getattr(value, name) for name in type(value).model_fields}
        found = {path: own} if (own := value.code()) else {}
    else:
        return {}
    for name, item in inner.items():
        found |= codes(item, f"{path}.{name}".lstrip("."))
    return found


class DatasetSettings(Settings, ABC):
    """Where samples come from and how they are turned into inputs."""

    probed_apart: ClassVar[bool] = False
    """Whether the labelled samples that probes see may come after stages and caches, which then do not hold them."""

    @abstractmethod
    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        """The splits, ready to read; `progress` is told of a download or a long look through the files.

        Raises:
            UsageError: it reads files, and there is no `data_dir`.
            NotReady: files are missing; the message lists them and says how to get them.
            DamagedData: files are there and unreadable.
        """

    def heeds(self) -> frozenset[str]:
        """Which of `data_dir` and `download` mean something to `open`: the others are refused where a user gives
        them.
        """
        return frozenset({"data_dir", "download"})

    def expects(self) -> tuple[Shape, dict[str, int]] | None:
        """Shape of a sample, and number of classes of each task, where the settings alone tell; None where only the
        files do. Lets memory be predicted before there are data.
        """
        return None

    def published_sizes(self) -> dict[str, int] | None:
        """Samples of each split of the dataset as its authors publish it, taken as the settings say; None where only
        the files tell. Lets caches be predicted before there are data.
        """
        return None


class NetworkSettings(Settings, ABC):
    """An encoder cut into gradient-isolated modules."""

    @abstractmethod
    def modules(self, sample_shape: Shape) -> list[Module]:
        """Freshly initialised modules 1, 2, … for samples of this shape, drawing from torch's global generator in
        order.
        """

    @property
    def has_context(self) -> bool:
        """Whether the last module aggregates a context over positions: end-to-end prediction then needs no other."""
        return False

    def scaled(self, scale: float) -> NetworkSettings:
        """The same network with about `scale` times the work a sample; itself where it cannot be made smaller."""
        return self

    def repeated(self, count: int) -> NetworkSettings:
        """A network of so many modules, each like this one's first: for the report of memory over depth.

        Raises:
            RecipeError: this kind of network has no such variant.
        """
        raise RecipeError(f"a {type(self).__name__} cannot be made deeper: --depth is for networks that can")

    def identity_through(self, number: int) -> dict[str, JsonValue]:
        """The settings that modules 1 to `number` depend on: adding a module on top must not change it."""
        return self.identity()

    def through(self, number: int | None) -> dict[str, JsonValue] | None:
        """`identity_through`, with the code of every class in the settings; of no module (None) the code alone."""
        found = {} if number is None else self.identity_through(number)
        if own := codes(self):
            found = {**found, "code": own}
        return found or None

    def fixed_features(self) -> dict[str, Callable[[], Module]]:
        """Features by hand that a probe can compare with: name to what makes the module, without parameters, that reads
        samples.
        """
        return {}


class ObjectiveSettings(Settings, ABC):
    """A local loss."""

    @abstractmethod
    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        """The loss for one module of a network whose samples have `sample_shape`.

        `classes`: number of classes of each task that the samples have labels for; empty where they have none.
        """


class Optimiser(Settings):
    """Adam (Kingma & Ba 2014)."""

    learning_rate: float = Field(2e-4, gt=0, le=10, description="size of a step; no unit")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the gradients, each step")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of the squared gradients, each step")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of that mean before it divides the step")
    weight_decay: float = Field(0.0, ge=0, description="times the weight, added to its gradient")


class Training(Settings):
    """How long a stage lasts and in what arithmetic."""

    batch_size: int = Field(32, ge=1, description="samples a step")
    epochs: int = Field(300, ge=0, description="the most epochs a module is trained; 0 leaves it as the seed makes it")
    patience: int = Field(
        10, ge=1, description="epochs without improvement of the validation loss after which a module has converged"
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
    update_every: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,),
        min_length=1,
        description="steps between two updates of module 1, 2, … when all are trained together; the last "
        "number holds for the modules above",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast, with float32 master weights")
    checkpoint_every: int = free(100, ge=1, description="steps between checkpoints within an epoch")
    keep_checkpoint: bool = free(
        True,
        description="keep the state of a finished training, about four times the bytes of its weights, so that it can "
        "go on for more epochs",
    )
    micro_batch: int | None = free(
        None, ge=1, description="samples that go through the module at once; null: the whole batch"
    )
    checkpointing: bool = free(
        False, description="keep activations between a module's blocks only, and compute the others again"
    )
    max_memory: Bytes | None = free(
        None, ge=1, description="bytes of device memory a stage may take; chooses micro_batch"
    )


class Probe(Settings):
    """A linear classifier on a frozen representation (paper, section 4 and appendix A).

    It reads the mean over the positions, or each position where each has a label of its own.
    """

    learning_rates: tuple[float, ...] = Field(
        (1e-3,), min_length=1, description="of Adam; of several, the best on a fifth of the training samples is taken"
    )
    epochs: int = Field(300, ge=1, description="epochs a classifier is trained")
    standardise: bool = Field(
        False,
        description="bring each feature to mean 0 and deviation 1, as of the training samples; the paper does not",
    )
    batch_size: int = Field(256, ge=1, description="samples a step, or positions where each has a label")
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
    views: int = Field(1, ge=1, description="augmentations stored for each training sample")
    probe_splits: bool = free(
        True, description="store the labelled splits too; false: a probe computes them through the frozen modules"
    )
    url: str | None = free(
        None,
        pattern=r"^((s3|gs|az)://|file:///)[^\s/]\S*$",
        description="where caches lie instead of in the run: s3://bucket/prefix, gs://, az:// or file://",
    )
    budget: Bytes | None = free(
        None, ge=1, description="bytes a cache may take; null: what the disk has free, less a reserve"
    )
    window_epochs: int = free(5, ge=1, description="epochs between two turns of the rolling window, where there is one")
    renew: bool = free(
        False, description="a rolling window even where all samples fit, for augmentations that were never seen"
    )


class Recipe(Settings):
    """Everything that one training needs to be told."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="name of its runs: letters, digits, - and _, at most 64",
    )
    dataset: SerializeAsAny[DatasetSettings] = Field(description="where samples come from")
    network: SerializeAsAny[NetworkSettings] = Field(description="the encoder, cut into modules")
    objective: SerializeAsAny[ObjectiveSettings] = Field(description="the local loss of each module")
    optimiser: Optimiser = Field(Optimiser(), description="how weights follow gradients")
    training: Training = Field(Training(), description="how long a stage lasts and in what arithmetic")
    stages: dict[Annotated[int, Field(ge=1)], dict[str, Any]] = Field(
        {},
        description="what differs for single modules, by number: fields of objective and optimiser, and of training "
        "epochs, patience, tolerance, keep and noise, as in stages.2.optimiser.learning_rate",
    )
    probe: Probe | SpeechProbes = Field(Probe(), description="the linear classifiers on frozen representations")
    cache: CacheSettings = Field(CacheSettings(), description="how outputs of frozen modules are stored")
    method: MethodName = Field("gim", description="how the network is trained; all but gim change other fields too")
    scale: float = Field(1.0, gt=0, le=1, description="below 1: fewer samples, epochs and channels, to try things out")
    schedule: ScheduleName = Field("iterative", description="one module after another, or all in each step")
    together: int | None = Field(
        None,
        ge=1,
        description="with the schedule simultaneous: modules 1 to this one are trained together, and those above one "
        "after another; null: all together",
    )
    feed: FeedName = Field(
        "cache", description="inputs of the stages above the first; recompute: through the frozen modules"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn at random")

    def groups(self, depth: int) -> list[tuple[int, ...]]:
        """The trainings of modules 1 to `depth`, in their order: the numbers of those that are trained at once.

        Raises:
            RecipeError: `stages` tells of a module that there is not.
        """
        if (most := max(self.stages, default=0)) > depth:
            raise RecipeError(
                f"stages.{most} would have no effect: there are modules 1 to {depth}. Leave it out, or "
                f"take it back with --set stages.{most}=null"
            )
        together = 1
        if self.schedule == "simultaneous":
            together = depth if self.together is None else min(self.together, depth)
        return [tuple(range(1, together + 1)), *((number,) for number in range(together + 1, depth + 1))]
