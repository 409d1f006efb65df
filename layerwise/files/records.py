"""The form of each JSON file of a run: its fields, their types and their limits, checked in this one place.

A seal says that a file is what somebody wrote; that it was us, nothing says. So every reader gets a record that has
been checked here, and a number or a name that no training gives is refused as damage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict  # noqa: UP035 (pydantic takes typing's own from Python 3.12 on)

from layerwise.errors import DamagedData
from layerwise.files.storage import read_json

# Fields that are not named here (of a later version) are kept as they are.
_exact = with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))

Count = Annotated[int, Field(ge=0, le=2**40)]
Bytes = Annotated[int, Field(ge=0, le=2**62)]
Epochs = Annotated[int, Field(ge=0, le=10**6)]
Number = Annotated[int, Field(ge=1, le=10_000)]
"""Of a module."""
Size = Annotated[int, Field(ge=1, le=2**24)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Loss = Annotated[float, Field(ge=-1e300, le=1e300)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Threads = Annotated[int, Field(ge=1, le=4096)]
Identity = dict[str, Any]


@_exact
class RunRecord(TypedDict):
    """run.json: the recipe (name or path), its overrides, and where the dataset lies."""

    recipe: Name
    set: list[Annotated[str, Field(max_length=65536)]]
    data_dir: Name | None


@_exact
class LastRecord(TypedDict):
    """runs/.last.json: the run that was used last."""

    run: Name


@_exact
class CachePlace(TypedDict):
    url: NotRequired[Annotated[str, Field(pattern=r"^((s3|gs|az)://|file:///)[^\s/]\S*$", max_length=4096)] | None]


@_exact
class RecipeRecord(TypedDict):
    """recipe.json: every field of the recipe; those named here are read without the recipe's code."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    cache: CachePlace


@_exact
class DatasetRecord(TypedDict):
    """dataset.json: what the stages above the first need to know of a dataset that they never open."""

    dataset: Identity
    sample_shape: Annotated[list[Size], Field(min_length=1, max_length=8)]
    sizes: dict[str, Count]
    classes: dict[str, Annotated[int, Field(ge=1, le=10**7)]]
    manifest: dict[str, str]
    notes: list[str]
    lengths: NotRequired[dict[str, Count]]


@_exact
class ExpectedModule(TypedDict):
    """The recipe's part of what a module's stage, cache and probe are made from."""

    group: Annotated[list[Number], Field(min_length=1, max_length=10_000)]
    """The modules that it is trained together with, itself among them."""
    stage: Identity
    cache: Identity
    stored: bool
    """Whether the next stage reads its cache."""
    probe: Identity
    part: Number
    """Of the network, whose probe is the module's."""


@_exact
class ExpectedRecord(TypedDict):
    """expected.json: what the recipe asks for, for those who look at the run without it."""

    dtype: Annotated[str, Field(pattern=r"^(float32|float16|bfloat16|uint8)$")]
    codec: Annotated[str, Field(pattern=r"^(none|lz4|zstd)$")]
    budget: Bytes | None
    renew: bool
    window_epochs: Annotated[int, Field(ge=1, le=10**6)]
    batch_size: Annotated[int, Field(ge=1, le=2**40)]
    feed: Annotated[str, Field(pattern=r"^(cache|recompute)$")]
    labelled: bool
    """Whether there are samples to probe with."""
    recipe: Digest
    """sha256 of the recipe.json that all this is of."""
    modules: Annotated[list[ExpectedModule], Field(min_length=1, max_length=10_000)]


@_exact
class PeakRecord(TypedDict):
    """Bytes in tensors at once, or None where that was not measured or cannot be predicted."""

    allocated: NotRequired[Count | None]
    reserved: NotRequired[Count | None]
    predicted: NotRequired[Count | None]


@_exact
class StageRecord(TypedDict):
    """stage.json: what a frozen module was made from, its hash, and how its training went."""

    made_from: Identity
    sha256: Digest
    """Of the file of weights."""
    weights: Digest
    """Of the names and numbers in it."""
    epochs: Epochs
    best_epoch: Epochs
    seconds: Seconds
    steps: Count
    peak: PeakRecord
    trained_with: Annotated[list[Number], Field(min_length=1, max_length=10_000)]
    threads: NotRequired[Threads | None]
    checkpoint_bytes: NotRequired[Count]
    """Of the files that let the training go on."""


@_exact
class PlaceRecord(TypedDict):
    """`stage.Place`, as JSON."""

    epoch: Epochs
    batch: Count
    step: Count
    sums: list[Loss]
    best_loss: Loss | None
    best_epoch: Epochs
    seconds: Seconds
    threads: NotRequired[Threads | None]


@_exact
class TensorsRecord(TypedDict):
    file: Annotated[str, Field(pattern=r"^checkpoint-[0-9]+-[0-9]+\.safetensors$", max_length=100)]
    sha256: Digest


@_exact
class Checkpoints(TypedDict):
    latest: TensorsRecord
    best: TensorsRecord


@_exact
class CheckpointRecord(TypedDict):
    """checkpoint.json: how far a training has come, and the files that hold its state."""

    made_from: Identity
    place: PlaceRecord
    files: Checkpoints


@_exact
class Outcome(TypedDict):
    """`probe.ProbeResult`, as JSON."""

    accuracy: Share
    train_accuracy: Share
    learning_rate: Annotated[float, Field(gt=0, le=1e6)]
    samples: Count
    test_samples: Count


@_exact
class Trained(TypedDict):
    trained: Outcome
    untrained: Outcome


@_exact
class Fixed(TypedDict):
    fixed: Outcome


@_exact
class ProbeRecord(TypedDict):
    """probes/N.json: linear classifiers on a module's representation, or on hand-crafted features, by task."""

    made_from: Identity
    module: Number | Name
    tasks: dict[str, Trained | Fixed]
    seconds: NotRequired[Seconds]


@_exact
class WindowRecord(TypedDict):
    """caches/N.window.json: how large the rolling window is, and for which settings that was settled."""

    budget: Bytes | None
    renew: NotRequired[bool]
    slots: Annotated[int, Field(ge=1, le=1000)]
    slot_samples: Annotated[int, Field(ge=1, le=2**40)]


@_exact
class PlaceOfCaches(TypedDict):
    """place.json: the run's own folder below cache.url."""

    name: Annotated[str, Field(pattern=r"^\.*[^./\x00-\x1f][^/\x00-\x1f]*$", max_length=255)]


@_exact
class EpochRecord(TypedDict):
    """A line of metrics.jsonl: the losses (nats) of each module that is trained there."""

    epoch: Annotated[int, Field(ge=1, le=10**6)]
    step: Count
    loss: list[Loss]
    validation_loss: list[Loss]
    seconds: Seconds


@_exact
class ReportRecord(TypedDict):
    """report/manifest.json: the files of the report, and the records of the run that it shows."""

    finished: bool
    files: dict[Annotated[str, Field(pattern=r"^[a-z]+\.(html|png)$")], Digest]
    shows: list[Annotated[str, Field(pattern=r"^(stages/[0-9]{1,5}/stage|probes/[A-Za-z0-9_-]+)\.json$")]]


Form = TypeVar("Form")

RUN = TypeAdapter(RunRecord)
LAST = TypeAdapter(LastRecord)
RECIPE = TypeAdapter(RecipeRecord)
EXPECTED = TypeAdapter(ExpectedRecord)
DATASET = TypeAdapter(DatasetRecord)
STAGE = TypeAdapter(StageRecord)
CHECKPOINT = TypeAdapter(CheckpointRecord)
PROBE = TypeAdapter(ProbeRecord)
WINDOW = TypeAdapter(WindowRecord)
PLACE = TypeAdapter(PlaceOfCaches)
EPOCH = TypeAdapter(EpochRecord)
REPORT = TypeAdapter(ReportRecord)


def read_record(path: Path, form: TypeAdapter[Form]) -> Form | None:
    """The record in the file, or None where there is no file.

    Raises:
        DamagedData: the file is not what was written, or not of this form.
    """
    content = read_json(path)
    return None if content is None else check_record(path, content, form)


def check_record(path: Path, content: object, form: TypeAdapter[Form]) -> Form:
    """The content of the file `path`, if it is of this form.

    Raises:
        DamagedData: it is not; the message names the field.
    """
    try:
        return form.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the record"
        found = "" if first["type"] == "missing" else f", found {repr(first['input'])[:80]}"
        raise DamagedData(
            f"{path} is damaged: {field}: {first['msg']}{found}. Delete it, and the command repeats that part."
        ) from error
