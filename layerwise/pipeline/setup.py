"""What a command works with: a run, its data, a device, and the modules at the state that they are in."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch

from layerwise.data.dataset import Splits
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.files.records import DATASET, DatasetRecord, read_record
from layerwise.files.storage import write_json
from layerwise.nets.module import Module, output_shapes
from layerwise.pipeline.holding import hold
from layerwise.pipeline.run import IN_PYTHON, Run
from layerwise.progress import Progress, Silent
from layerwise.recipe.learner import make_learner
from layerwise.recipe.loader import require_heeded
from layerwise.recipe.recipe import Recipe
from layerwise.seeding import derive_seed, same_bits_in_every_run, seeded
from layerwise.settings.base import Shape
from layerwise.training.ranks import ALONE, Ranks
from layerwise.training.step import Arithmetic, Learner


@dataclass(frozen=True)
class DatasetFacts:
    """What the stages above the first need to know of a dataset they never open."""

    sample_shape: tuple[int, ...]
    sizes: dict[str, int]
    """Split to number of samples."""
    classes: dict[str, int]
    """Task to number of classes."""
    manifest: dict[str, str]
    """Split to sha256 of its contents."""
    notes: list[str]
    lengths: dict[str, int] = field(default_factory=dict)
    """Split whose samples differ in length to the mean of their lengths, rounded."""


@dataclass(frozen=True)
class Origin:
    """Where a run's recipe came from: what a later command needs to make it again."""

    source: str
    """Name or path of the recipe."""
    overrides: tuple[str, ...]
    """`key=value`, in their order."""
    as_written: Recipe
    """Before overrides, scale and method."""


@dataclass(eq=False)
class Setup:
    """A run with everything that is needed to work on it."""

    run: Run
    device: torch.device
    data_dir: Path | None = None
    download: bool = False
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False
    at_steps: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around work that asks `should_stop` itself, and that nothing else should stop."""
    writes: bool = True
    """Whether work holds the run, and notes in it what it follows; looking at one must not change it."""
    measure_threads: bool = False
    """Whether trainings on a CPU choose their number of threads, where the user set none; else torch's is used."""
    asked: tuple[str, ...] = ()
    """The options of the command at work that choose recipe, settings and data, word by word."""
    origin: Origin | None = None
    """None: the recipe was made in Python."""
    ranks: Ranks = ALONE
    """The processes that train together."""
    remember: bool = False
    """Whether the run becomes the one that was used last, which commands use that name none."""
    _held: bool = field(default=False, init=False)
    _opened: DatasetRecord | None = field(default=None, init=False)
    _forgotten: bool = field(default=False, init=False)

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    def command(self, words: str, *overrides: str) -> str:
        """A command line for this run, to be suggested: `words` with this command's own options, which a refused
        command does not leave in the run, and with `overrides` (`key=value`) in place of those of the same field.
        """
        replaced = {override.partition("=")[0] for override in overrides}
        kept = [word for word in self.asked if word.removeprefix("--set=").partition("=")[0] not in replaced]
        added = [f"--set={override}" for override in overrides]
        return shlex.join(["layerwise", *words.split(), "--run-dir", str(self.run.folder), *kept, *added])

    @contextmanager
    def held(self, purpose: str) -> Iterator[None]:
        """Hold the run while the block works on it: locked, with its recipe noted, and on a CPU with sums in one order.
        Blocks may lie within each other.

        Raises:
            RecipeError: a field of the recipe would be ignored.
            RunLocked: another process holds the run.
        """
        if self._held or not self.writes:
            yield
            return
        require_heeded(self.recipe)
        origin = self.origin or Origin(IN_PYTHON, (), self.recipe)
        with (
            hold(
                self.run,
                purpose,
                origin.source,
                origin.overrides,
                self.data_dir,
                origin.as_written,
                remember=self.remember,
            ),
            same_bits_in_every_run() if self.device.type == "cpu" else nullcontext(),
        ):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    @cached_property
    def splits(self) -> Splits:
        """The dataset, opened; what it is like is noted in the run."""
        splits = self.recipe.dataset.open(
            self.data_dir, download=self.download, seed=self.recipe.seed, progress=self.progress
        )
        for note in splits.notes:
            self.progress.note(note)
        named = splits.named()
        manifest = {name: split.manifest() for name, split in named.items()}
        facts: DatasetRecord = {
            "dataset": self.recipe.dataset.identity(),
            "sample_shape": [size for size in splits.train.sample_shape if size is not None],  # all: it is for training
            "sizes": {name: len(split) for name, split in named.items()},
            "classes": splits.classes,
            "manifest": manifest,
            "notes": list(splits.notes),
            "lengths": {
                name: round(split.lengths.mean()) for name, split in named.items() if split.lengths is not None
            },
        }
        if not self._forgotten:
            self._require_same_dataset(facts)
        self._opened = facts
        if self.writes:
            write_json(self._note, facts)
        return splits

    def _noted(self) -> DatasetRecord | None:
        """What the run notes of this recipe's dataset, if that was opened before.

        Raises:
            DamagedData: it cannot be true.
        """
        known, expected = read_record(self._note, DATASET), self.recipe.dataset.expects()
        if known is None or known["dataset"] != self.recipe.dataset.identity():
            return None
        splits, shape = known["sizes"].keys(), tuple(known["sample_shape"])
        if splits != known["manifest"].keys() or not {"train", "validation"} <= splits:
            wrong = f"it tells of the splits {', '.join(splits)} and has hashes of {', '.join(known['manifest'])}"
        elif expected is not None and shape != expected[0]:
            wrong = f"it says that samples are {shape}, and by its settings the dataset makes them {expected[0]}"
        else:
            return known
        raise DamagedData(f"{self._note} is damaged: {wrong}. Delete it, and the dataset is read again.")

    def _require_same_dataset(self, found: DatasetRecord) -> None:
        known, manifest = self._noted(), found["manifest"]
        if known is None:
            return
        if known["manifest"] == manifest:
            if (known["sample_shape"], known["sizes"], known["classes"]) != (
                found["sample_shape"],
                found["sizes"],
                found["classes"],
            ):
                raise DamagedData(
                    f"{self._note} is damaged: its shape of a sample, numbers of samples or numbers of classes are not "
                    "those of the dataset, though it names the same samples. Delete it, and it is written again."
                )
            return
        changed = sorted(name for name in manifest if known["manifest"].get(name) != manifest[name])
        raise NotReady(
            f"the dataset has changed since {self.run.folder} was started: its samples of {', '.join(changed)} "
            "differ. Restore the old files, choose another --run-dir, or start over with --fresh."
        )

    def forget_dataset(self) -> None:
        """Begin again, with whatever the dataset holds now; the run keeps its note where that cannot be opened."""
        if not self._forgotten:
            for name in ("splits", "facts", "module_facts"):
                self.__dict__.pop(name, None)
            self._forgotten = True
            _ = self.splits

    @property
    def _note(self) -> Path:
        return self.run.folder / "dataset.json"

    @cached_property
    def facts(self) -> DatasetFacts:
        """From the run's note where there is one for this recipe, so that a cached stage runs without the dataset."""
        known = self._noted()
        if known is None:
            _ = self.splits
            known = self._opened
        assert known is not None
        return DatasetFacts(
            tuple(known["sample_shape"]),
            known["sizes"],
            known["classes"],
            known["manifest"],
            known["notes"],
            known.get("lengths", {}),
        )

    @property
    def knows_dataset(self) -> bool:
        """Whether `facts` were needed so far."""
        return "facts" in self.__dict__

    def untrained(self) -> list[Module]:
        """All modules as the seed makes them, on the CPU: only those that work belong on the device."""
        with seeded(self.recipe.seed, "modules"):
            return self.recipe.network.modules(self.facts.sample_shape)

    @cached_property
    def module_facts(self) -> list[dict[str, int]]:
        """Number, parameters, channels and number of parts of each module, without making one."""
        return self.recipe.network.facts(self.facts.sample_shape)

    @cached_property
    def output_shapes(self) -> list[Shape]:
        """Of each module's output for one training sample."""
        return output_shapes(self.untrained, self.facts.sample_shape)

    @property
    def depth(self) -> int:
        """How many modules there are."""
        return len(self.module_facts)

    def group(self, number: int) -> tuple[int, ...]:
        """The modules that module `number` is trained together with, itself among them."""
        return next(group for group in self.recipe.groups(self.depth) if number in group)

    @property
    def holders(self) -> list[int]:
        """For each part of the network that a probe can look at, the module that holds it.

        A part is a module, unless several were merged into one: they keep their numbers as parts.
        """
        return [facts["module"] for facts in self.module_facts for _ in range(facts["parts"])]

    def require_module(self, number: int) -> None:
        """
        Raises:
            UsageError: the recipe has no such module.
        """
        if not 1 <= number <= self.depth:
            raise UsageError(
                f"there is no module {number}: the recipe {self.recipe.name!r} has modules 1 to {self.depth}"
            )

    def learner(self, number: int, module: Module) -> Learner:
        """The module, brought to the device, with a fresh objective and optimiser."""
        return make_learner(self.recipe, number, module, self.facts.sample_shape, self.facts.classes, self.device)

    @property
    def arithmetic(self) -> Arithmetic:
        """Of trainings, which all processes share."""
        training, seed = self.recipe.training, self.recipe.seed
        return Arithmetic(self.device, training.precision, training.micro_batch, seed, training.loss_group, self.ranks)

    @property
    def part(self) -> slice:
        """The samples of each training batch that this process takes."""
        return slice(None) if self.ranks.alone else self.arithmetic.part(self.recipe.training.batch_size)

    def order_seed(self, number: int) -> int:
        """Seed of the order in which a stage sees its samples, whatever feeds it."""
        return derive_seed(self.recipe.seed, "order", number)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def holds(
    purpose: str,
) -> Callable[[Callable[Concatenate[Setup, Arguments], Result]], Callable[Concatenate[Setup, Arguments], Result]]:
    """Decorate work on a run, so that it holds the run, whoever calls: a command, a script or a notebook."""

    def decorate(
        work: Callable[Concatenate[Setup, Arguments], Result],
    ) -> Callable[Concatenate[Setup, Arguments], Result]:
        @wraps(work)
        def held(setup: Setup, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with setup.held(purpose):
                return work(setup, *args, **kwargs)

        return held

    return decorate
