"""Networks, data and losses that are handed over as objects, as settings of a recipe.

What they are goes into the identity of stages and caches as digests: of code and initial weights for modules, of the
content of some samples for datasets, of code for losses. `version` is for what a digest cannot see.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from layerwise.data.dataset import Split, Splits
from layerwise.data.mapped import Dataset, MappedSplit, Read
from layerwise.data.parts import Part
from layerwise.data.settings import DatasetSettings
from layerwise.errors import NotReady
from layerwise.files.tensors import weights_digest
from layerwise.nets.module import Module
from layerwise.nets.settings import NetworkSettings
from layerwise.objectives.objective import Context, Objective
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator
from layerwise.settings.base import Shape, free, labelled_only, later
from layerwise.settings.sources import NoSource, code_of

HELD_OUT = 0.1  # of the training samples, where no others are given to tell when a module has converged
ELSEWHERE = "was passed in as Python objects, which the run's files do not contain: use the script that made it"


Count: TypeAlias = Annotated[int, Field(ge=0, le=2**48)]


class GivenNetwork(NetworkSettings):
    """Modules that were made in Python."""

    fingerprints: tuple[str, ...] = Field(min_length=1, description="of each module's code and initial weights, sha256")
    sizes: tuple[tuple[Count, Count], ...] = free((), description="parameters and channels of each module")
    _modules: tuple[Module, ...] = PrivateAttr(default=())

    @classmethod
    def of(cls, modules: Sequence[Module]) -> GivenNetwork:
        sizes = tuple((sum(w.numel() for w in module.parameters()), module.channels) for module in modules)
        found = cls(fingerprints=tuple(map(fingerprint, modules)), sizes=sizes)
        found._modules = tuple(modules)
        return found

    def modules(self, sample_shape: Shape) -> list[Module]:
        if not self._modules:
            raise NotReady(f"the network of this run {ELSEWHERE}")
        return [_fresh(module) for module in self._modules]

    def facts(self, sample_shape: Shape) -> list[dict[str, int]]:
        """Also where the modules themselves are not at hand."""
        if self._modules:
            return super().facts(sample_shape)
        return [
            {"module": number, "parameters": parameters, "channels": channels, "parts": 1}
            for number, (parameters, channels) in enumerate(self.sizes, 1)
        ]

    def identity_through(self, number: int) -> dict[str, Any]:
        return {"kind": type(self).__name__, "fingerprints": list(self.fingerprints[:number])}


def _fresh(module: Module) -> Module:
    """A copy with the initial weights; where only shapes are asked for, without them."""
    if detect_fake_mode() is None and torch.get_default_device().type != "meta":
        return copy.deepcopy(module)
    # Within the mode or on the device that asks, empty tensors take no memory.
    memo: dict[int, Any] = {
        id(w): nn.Parameter(torch.empty(w.shape, dtype=w.dtype), w.requires_grad) for w in module.parameters()
    }
    memo |= {id(b): torch.empty(b.shape, dtype=b.dtype) for b in module.buffers()}
    return copy.deepcopy(module, memo)


def fingerprint(module: nn.Module) -> str:
    """sha256 of a module's layers, their settings, the forward that a cut gave it, and its weights."""
    digest = hashlib.sha256(weights_digest(module).encode())
    for name, layer in module.named_modules():
        code = getattr(layer, "code", "") or code_digest(layer)  # the forward that `split` wrote
        digest.update(
            f"{name} {type(layer).__module__}.{type(layer).__qualname__} {layer.extra_repr()} {code}".encode()
        )
    return digest.hexdigest()


class GivenData(DatasetSettings):
    """Datasets that were made in Python."""

    probed_apart: ClassVar[bool] = True
    sources: tuple[str, ...] = Field((), description="sha256 of the code of your datasets and transforms")
    revision: str = Field(
        "",
        description="change it after an edit that no digest sees: stages and caches then count as made from "
        "something else",
    )
    classes: tuple[tuple[str, int], ...] = Field((), description="number of classes of each task")
    labelled: bool = labelled_only(False, description="whether there are labelled samples to probe with")
    workers: int = free(0, ge=0, le=1024, description="processes that read samples; 0: the training's own")
    _sets: dict[str, Dataset] = PrivateAttr(default_factory=dict)
    _read: Read | None = PrivateAttr(default=None)

    @classmethod
    def of(
        cls,
        train: Dataset,
        validation: Dataset | None,
        *,
        read: Read | None = None,
        workers: int = 0,
        version: str = "",
    ) -> GivenData:
        own = [code for one in (train, validation, read) if one is not None for code in _codes(one)]
        found = cls(
            sources=tuple(own),
            revision=version,
            classes=tuple(_classes(MappedSplit(train, "train", 0, read=read), train).items()),
            workers=workers,
        )
        found._sets = {"train": train} if validation is None else {"train": train, "validation": validation}
        found._read = read
        return found

    def with_labelled(self, train: Dataset, test: Dataset) -> GivenData:
        """The same, with labelled samples that a probe learns from and is judged on."""
        found = self.model_copy(update={"labelled": True})
        found._sets, found._read = {**self._sets, "probe": train, "test": test}, self._read
        return found

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        if not self._sets:
            raise NotReady(f"the dataset of this run {ELSEWHERE}")
        splits: dict[str, Split] = {
            name: MappedSplit(dataset, name, seed, workers=self.workers, read=self._read)
            for name, dataset in self._sets.items()
        }
        notes: tuple[str, ...] = ()
        if "validation" not in splits:
            train = splits["train"]
            order = numpy_generator(0, "held out").permutation(len(train))
            held = max(1, int(len(order) * HELD_OUT))
            splits |= {"train": Part(train, order[held:]), "validation": Part(train, order[:held])}
            notes = (f"{held} of {len(order)} training samples are held out for validation",)
        return Splits(**splits, classes=dict(self.classes), notes=notes)


def _codes(dataset: Any) -> Iterator[str]:
    """Of a dataset, of its transforms, and of the dataset that it is a part of."""
    inner = [getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms")]
    inner += getattr(inner[0], "transforms", [])  # of a composed one
    yield from filter(None, (code_digest(one) for one in (dataset, *inner) if one is not None))
    if (whole := getattr(dataset, "dataset", None)) is not None:
        yield from _codes(whole)


def _classes(split: MappedSplit, dataset: Dataset) -> dict[str, int]:
    """Number of classes of each task, from the dataset's own list of them or from its labels."""
    names = getattr(dataset, "classes", None)
    if len(split.tasks) == 1 and isinstance(names, Sequence):
        return {split.tasks[0]: len(names)}
    return {task: int(values.max()) + 1 for task, values in split.labels.items()}


Loss: TypeAlias = Callable[[tuple[Tensor, ...], Context], Tensor]
"""From the representations of a batch and its context (labels, a random generator) to a scalar."""


class GivenObjective(ObjectiveSettings):
    """A loss that was made in Python."""

    source: str = Field(description="the objects passed in, and the sha256 of their code")
    carried: int = later(1, ge=1, le=64, description="augmented views of each sample that the loss compares")
    _make: Callable[[Module], Objective | Loss] | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, loss: Objective | Loss | type[nn.Module], views: int = 1) -> GivenObjective:
        """`loss`: an `Objective`; a function of representations and context; a module called with both; or a class,
        which is called with each `Module` to make one of these.
        """
        if isinstance(loss, type):
            make: Callable[[Module], Any] = loss
        elif isinstance(loss, nn.Module):
            initial = loss

            def make(module: Module) -> Any:
                return copy.deepcopy(initial)
        else:

            def make(module: Module) -> Any:
                return loss

        found = cls(source=_code_of(loss), carried=views)
        found._make = make
        return found

    @property
    def views(self) -> int:
        return self.carried

    def build(self, module: Module, sample_shape: Shape, classes: Mapping[str, int]) -> Objective:
        if self._make is None:
            raise NotReady(f"the loss of this run {ELSEWHERE}")
        made = self._make(module)
        return made if isinstance(made, Objective) else CalledLoss(made)


class CalledLoss(Objective):
    """A function, or a module, of the representations of a batch and its context."""

    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function

    def loss(self, representations: tuple[Tensor, ...], context: Context) -> Tensor:
        return self.function(representations, context)


def _code_of(loss: Any) -> str:
    kind = loss if isinstance(loss, type | FunctionType) else type(loss)
    state = weights_digest(loss) if isinstance(loss, nn.Module) else ""
    return f"{kind.__qualname__} {hashlib.sha256((code_digest(loss) + state).encode()).hexdigest()}"


def code_digest(thing: Any) -> str:
    """sha256 of the source of a function, a class, or the class of an object; empty where it is part of a package.

    What is defined in the script itself, or in a notebook, is seen by itself, and other code by its whole file and the
    local files that this one imports (see `layerwise.settings.sources`). Where there is no source, nothing is seen.
    """
    kind = thing if isinstance(thing, type | FunctionType) else type(thing)
    if kind.__module__ == "__main__":
        try:
            return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
        except (OSError, TypeError):
            return ""
    if kind.__module__.partition(".")[0] in ("torch", "torchvision", "torchaudio", "datasets", "builtins"):
        return ""
    try:
        return code_of(kind) or ""
    except NoSource:
        return ""
