"""The toolkit from Python: train a network of one's own module by module, on data of one's own.

    run = lw.train(lw.split(net, at=["layer2", "layer3"]), objective=..., train=dataset, to="runs/mine")
    run.probe(3, train=labelled, test=held_out)
    encoder = run.encoder(through=2)

What was trained before is found again: the same call goes on where an interrupted one stopped.

Letters: B batch, C channels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import activation_cache
from layerwise.data.mapped import Dataset, MappedSplit, Read
from layerwise.errors import ProcessLost, UsageError
from layerwise.nets.encoder import Encoder
from layerwise.nets.plain import Represent, plain_modules
from layerwise.objectives.objective import Objective
from layerwise.objectives.settings import ObjectiveSettings
from layerwise.pipeline.embed import embed_files, require_writable, write_embeddings
from layerwise.pipeline.expected import note_expected
from layerwise.pipeline.export import Exported, export_encoder, require_free
from layerwise.pipeline.following import follow, leading
from layerwise.pipeline.frozen import load_frozen
from layerwise.pipeline.module_cache import open_cache
from layerwise.pipeline.probe import probe_module
from layerwise.pipeline.remembered import remembered_recipe
from layerwise.pipeline.results import collect, for_report
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_all
from layerwise.pipeline.setup import Origin, Setup
from layerwise.progress import SILENT, Progress
from layerwise.recipe.given import GivenData, GivenNetwork, GivenObjective, Loss
from layerwise.recipe.loader import resolve_recipe
from layerwise.recipe.optimisers import GivenOptimiser, optimiser_of
from layerwise.recipe.recipe import Recipe
from layerwise.render.progress import console_progress
from layerwise.render.report import write_report
from layerwise.render.trackers import tracked
from layerwise.settings.choices import FeedName, ScheduleName, TrackerName
from layerwise.settings.training import CacheSettings, Optimiser, Probe, Training
from layerwise.training.feeds import decoder, stacked
from layerwise.training.ranks import ALONE, Ranks, joined, local_device

if TYPE_CHECKING:
    import zarr

OWN_PROBE = Probe(learning_rates=(1e-2, 1e-3), epochs=100, standardise=True)
"""The classifier on a network of one's own, where no other is given."""


def describe(
    modules: Sequence[nn.Module],
    objective: ObjectiveSettings | Objective | Loss | type[nn.Module],
    train: Dataset,
    validation: Dataset | None = None,
    *,
    name: str = "own",
    optimiser: GivenOptimiser | None = None,
    epochs: int = 50,
    batch_size: int = 32,
    max_memory: int | str | None = None,
    patches: tuple[int, int] | None = None,
    represent: Represent | None = None,
    views: int = 1,
    feed: FeedName = "cache",
    schedule: ScheduleName = "iterative",
    cache: Literal["float32", "float16", "bfloat16", "uint8"] = "float16",
    seed: int = 0,
    read: Read | None = None,
    workers: int = 0,
    version: str = "",
    labelled: tuple[Dataset, Dataset] | None = None,
    probe: Probe = OWN_PROBE,
    **training: Any,
) -> Recipe:
    """A recipe of modules, data and a loss that were made in Python. In a file, as `recipe = lw.describe(…)`, every
    command takes it: `layerwise run --recipe FILE.py`.

    Args:
        modules: each reads what the one before returns; `split` cuts a network into such. They stay as they are: copies
            are trained.
        objective: settings such as PatchInfoNCE(steps=3); a function of (representations, context) that returns a
            scalar; an `Objective` or another `nn.Module` that is called so; or a class that makes one from each module.
        train: a map-style dataset. Its samples are an input, (input, label), or a dict; `read` takes any other form.
        validation: tells when a module has converged. By default a tenth of the training samples.
        name: of its runs.
        epochs: the most that a module is trained; fewer where its validation loss stops falling.
        max_memory: bytes, or as "500MB": what a stage may take, by micro-batches of the same gradients.
        patches: size and stride, in pixels, of the patches of an image that the modules see one at a time.
        represent: from what a module returns to its representation, (B, C) or (B, C, *positions). By default what it
            returns.
        views: augmentations of each sample that the loss compares, drawn by the dataset's own transforms. The loss then
            gets representations (B, views, C, *positions).
        feed: "recompute" passes the data through the frozen modules in every epoch, instead of reading a cache.
        schedule: "simultaneous" trains all modules in each step; "pipelined" likewise, and under torchrun each process
            has some of the modules.
        cache: the dtype in which outputs are stored.
        workers: processes that read samples.
        version: another one begins anew where data or code changed and no digest can see it.
        labelled: two datasets with labels: a probe learns from the first and is judged on the second.
        probe: the classifier.
        training: other fields of `Training`, such as patience=5 or precision="bf16".

    Raises:
        UsageError, RecipeError: see layerwise.errors; each message says what to do.
    """
    data = GivenData.of(train, validation, read=read, workers=workers, version=version)
    sample = MappedSplit(train, "train", seed, read=read).batch(np.array([0]), None)[0]
    made = plain_modules(modules, sample, represent, patches=patches)
    return Recipe(
        name=name,
        dataset=data if labelled is None else data.with_labelled(*labelled),
        network=GivenNetwork.of(made),
        objective=objective if isinstance(objective, ObjectiveSettings) else GivenObjective.of(objective, views),
        optimiser=Optimiser() if optimiser is None else optimiser_of(optimiser),
        training=Training(batch_size=batch_size, epochs=epochs, max_memory=max_memory, **training),
        probe=probe,
        cache=CacheSettings(dtype=cache),
        feed=feed,
        schedule=schedule,
        seed=seed,
    )


def train(
    modules: Sequence[nn.Module],
    objective: ObjectiveSettings | Objective | Loss | type[nn.Module],
    train: Dataset,
    validation: Dataset | None = None,
    *,
    to: str | Path,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quiet: bool = False,
    track: TrackerName | None = None,
    **settings: Any,
) -> Trained:
    """Train these modules one after another, each by its own copy of the objective and from the cache of the one below.

    Under torchrun every process makes this call, and they train together; the first one writes and prints. What is
    called on the run afterwards belongs to the first process: `if int(os.environ.get("RANK", 0)) == 0:`.

    Args:
        modules: as `describe` takes them.
        objective: as `describe` takes it.
        train: as `describe` takes it.
        validation: as `describe` takes it.
        settings: the other arguments of `describe`.
        to: the folder of the run.
        track: "tensorboard", "wandb" or "trackio" is told the losses of each step, and what is measured, as well.

    Raises:
        UsageError, NotReady, WillNotFit, …: see layerwise.errors; each message says what to do.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(to).absolute().name).strip("-_")[:64] or "run"
    recipe = describe(modules, objective, train, validation, **{"name": name, **settings})
    run = Trained(Path(to), recipe, _device(device), quiet, track=track)
    ranks = joined(run.device)
    if ranks.first:
        with leading(ranks), run.working("train", ranks) as setup:
            run_all(setup)
    elif follow(ranks, lambda _: run.setup_of(ranks)):
        raise ProcessLost("the first process of this training ended with an error; see its message")
    return run


def open(
    folder: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    data_dir: str | Path | None = None,
    quiet: bool = False,
) -> Trained:
    """Open a run of any command or script: its curves, caches, frozen encoder and, where labels are at hand, probes.

    What was handed to `train` as an object (a network, a dataset, a loss) is not in the run: the same call of `train`
    brings it back.

    Args:
        data_dir: where the dataset's files lie, if not where they did when the run was last used.

    Raises:
        NotReady: there is no run in `folder`.
        UsageError: its recipe is a file that was not named on this machine, and is needed.
    """
    source, overrides, as_written = remembered_recipe(Path(folder), lambda note: print(note, file=sys.stderr))
    recipe = resolve_recipe(as_written, overrides)
    known = open_run(Path(folder), recipe).data_dir
    origin = Origin(source, tuple(overrides), as_written)
    return Trained(Path(folder), recipe, _device(device), quiet, known if data_dir is None else Path(data_dir), origin)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError('device="cuda": this machine has no usable CUDA device. Choose "cpu" or "auto"')
    return local_device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Trained:
    """A run: `folder` holds it, and `recipe` says all of its settings."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        device: torch.device,
        quiet: bool,
        data_dir: Path | None = None,
        origin: Origin | None = None,
        track: TrackerName | None = None,
    ) -> None:
        self.folder, self.recipe, self.device, self._quiet = folder, recipe, device, quiet
        self._data_dir, self._origin, self._track = data_dir, origin, track

    def __repr__(self) -> str:
        setup = self.setup_of()
        return f"<run {self.folder}: {setup.depth} modules, {type(self.recipe.objective).__name__}>"

    def encoder(self, through: int | None = None) -> Encoder:
        """Modules 1 to `through` (by default all), frozen, in evaluation mode, on the run's device."""
        setup = self.setup_of()
        number = setup.depth if through is None else through
        setup.require_module(number)
        return Encoder(load_frozen(setup, number))

    def export(self, to: str | Path, through: int | None = None, *, overwrite: bool = False) -> Exported:
        """Write modules 1 to `through` (by default all) to a file that works without the run.

        Args:
            to: ends in .pt2 (runs with torch alone), .onnx (with ONNX Runtime) or .safetensors (weights). A JSON file
                beside it says how a picture or a recording becomes an input.

        Returns:
            The files, and as `loader` the code that loads them.
        """
        setup = self.setup_of()
        return export_encoder(setup, through or len(setup.holders), Path(to), overwrite=overwrite)

    def embed(
        self,
        files: Sequence[str | Path],
        module: int | None = None,
        *,
        positions: bool = False,
        to: str | Path | None = None,
        overwrite: bool = False,
    ) -> dict[str, Tensor]:
        """Representations of new images or recordings, by path: (C,), the mean over the positions, which a probe reads.

        Files are decoded and preprocessed as the dataset's own are for a probe. Inputs of a dataset that was made in
        Python go through `encoder` instead.

        Args:
            module: by default the last.
            positions: (C, *positions) instead of the mean.
            to: a file to write them to as well: .safetensors, .npz or .parquet.
        """
        if to is not None:
            require_writable(Path(to))
            require_free((Path(to),), overwrite)
        with console_progress(sys.stderr) as console:
            setup = self.setup_of(progress=SILENT if self._quiet else console)
            found = embed_files(setup, module or len(setup.holders), list(map(Path, files)), positions=positions)
        if to is not None:
            write_embeddings(found, Path(to))
        return found.values

    def cache(self, module: int) -> dict[str, CachedSplit]:
        """What a module gave for each sample of "train" and "validation"."""
        setup = self.setup_of()
        location = setup.run.cache(module)
        return {name: CachedSplit(split, location) for name, split in open_cache(setup, module).splits.items()}

    def probe(
        self,
        module: int | None = None,
        *,
        train: Dataset | None = None,
        test: Dataset | None = None,
        settings: Probe | None = None,
    ) -> dict[str, dict[str, float]]:
        """Accuracy, from 0 to 1, of a linear classifier on a module's frozen representation, by task: "trained", and
        "untrained" for the same network as it was before.

        Args:
            module: by default the last.
            train: labelled samples that the classifier learns from. A recipe's dataset already has them.
            test: labelled samples that measure its accuracy, likewise.
            settings: of the classifier.

        Raises:
            UsageError: labelled samples are missing, or are given beside those of a recipe's dataset.
        """
        own = isinstance(self.recipe.dataset, GivenData)
        if (train is None or test is None) if own else (train is not None or test is not None):
            raise UsageError(
                "a probe needs labelled samples: pass train=DATASET and test=DATASET"
                if own
                else f"the labelled samples are those of the recipe {self.recipe.name!r}: leave out train and test"
            )
        if isinstance(self.recipe.dataset, GivenData) and train is not None and test is not None:
            data = self.recipe.dataset.with_labelled(train, test)
            settings = settings or OWN_PROBE
            self.recipe = self.recipe.model_copy(update={"dataset": data})
        if settings is not None:
            self.recipe = self.recipe.model_copy(update={"probe": settings})
        with self.working("probe") as setup:
            found = probe_module(setup, module or setup.depth)
        return {
            task: {state: float(one["accuracy"]) for state, one in by.items()} for task, by in found["tasks"].items()
        }

    def history(self) -> list[dict[str, Any]]:
        """For each module its `module` number and `curve`: epoch, step, loss and validation_loss in nats."""
        stages = collect(self.setup_of())["stages"]
        return [{"module": stage["module"], "curve": stage["curve"]} for stage in stages]

    def memory(self) -> list[dict[str, Any]]:
        """For each training its `modules`, `peak_bytes`, whether that was "measured" or "predicted" (`peak_kind`), and
        its time in seconds.
        """
        found: list[dict[str, Any]] = collect(self.setup_of())["trainings"]
        return found

    def report(self) -> Path:
        """Write report/report.html into the run's folder: curves, probes, memory, caches. Returns its path."""
        with self.working("report") as setup:
            return write_report(for_report(setup), setup.run.report)

    @contextmanager
    def working(self, purpose: str, ranks: Ranks = ALONE) -> Iterator[Setup]:
        """The run, held while the block runs."""
        with (
            console_progress(sys.stderr) as console,
            tracked(SILENT if self._quiet else console, self._track, self.folder) as progress,
        ):
            setup = self.setup_of(ranks, progress)
            setup.writes = True
            with setup.held(purpose):
                yield setup
                note_expected(setup)

    def setup_of(self, ranks: Ranks = ALONE, progress: Progress = SILENT) -> Setup:
        """What works on the run, in one process or as one of several."""
        return Setup(
            open_run(self.folder, self.recipe),
            self.device,
            self._data_dir,
            progress=progress,
            writes=False,
            measure_threads=True,
            origin=self._origin,
            ranks=ranks,
        )


class CachedSplit(torch.utils.data.Dataset[Any]):
    """Cached outputs of a module as a dataset: split[3], split[:100], split[[5, 2]] give float32 outputs and labels.

    The labels are a tensor where there is one task, else a dict by task; None where there are none. `ids` names the
    samples, and `zarr` is the array on disk.
    """

    def __init__(self, split: activation_cache.Split, location: Path | str) -> None:
        self._split, self._location = split, location
        self._decode = decoder(split.storage.dtype, split.calibration, len(split.shape), torch.device("cpu"))

    def __repr__(self) -> str:
        return f"<{len(self)} cached samples of shape {self._split.shape}, stored as {self._split.storage.dtype}>"

    def __len__(self) -> int:
        return len(self._split)

    @property
    def ids(self) -> list[str]:
        return self._split.ids

    @property
    def zarr(self) -> zarr.Array[Any]:
        """The numbers as they are stored, in the order of `ids`, opened with zarr-python: bfloat16 as its bits in
        uint16, uint8 before its scale. zarr-python does not check what the commit record knows; reading through this
        class does.

        Raises:
            UsageError: the cache lies on an object store.
        """
        import zarr

        if not isinstance(self._location, Path):
            raise UsageError(f"the cache lies at {self._location}: open it there with zarr and the store's own library")
        return zarr.open_array(self._location / self._split.name / "values" / "0", mode="r")

    def __getitem__(self, index: int | slice | Sequence[int]) -> tuple[Tensor, Any]:
        alone = isinstance(index, int | np.integer)
        if isinstance(index, slice):
            chosen = np.arange(len(self))[index]
        else:
            chosen = np.atleast_1d(np.asarray(index))
            chosen = np.where(chosen < 0, chosen + len(self), chosen)
        values = self._decode(torch.from_numpy(stacked(self._split.read(chosen))))
        labels = {
            task: torch.as_tensor(stacked([known[i] for i in chosen])) for task, known in self._split.labels.items()
        }
        if alone:
            values, labels = values[0], {task: known[0] for task, known in labels.items()}
        return values, next(iter(labels.values()), None) if len(labels) < 2 else labels
