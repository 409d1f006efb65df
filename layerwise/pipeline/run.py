"""The run directory: everything one training produced, who holds it, and which parts of it are still true.

RUN/
  run.json                    recipe (name or path), overrides and the dataset's place: enough to go on
  expected.json               what its recipe asks for, for those who look at the run without it
  recipe.json                 the recipe as it is trained, every field, and as its file gives it
  place.json                  the run's own folder below cache.url, where its caches lie there
  lock                        held while a command writes
  stages/1/module.safetensors the frozen module
  stages/1/stage.json         written last: what it was made from, its hash, how the training went
  stages/1/metrics.jsonl      a sealed line an epoch
  stages/1/checkpoint.json, checkpoint-STEP-EPOCH.safetensors     while it trains, and then to train it for more epochs
  caches/1/                   module 1's outputs, a Zarr v3 group
  caches/1-window/            a rolling window on them, and 1.window.json: how it rolls
  probes/1.json               linear classifiers on module 1's representation
  curves/                     what trackers wrote (--track), if there is one
  report/                     report.html, and manifest.json with its hash
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import NotReady, UsageError, WillNotFit
from layerwise.files.records import LAST, PLACE, RECIPE, RUN, read_record
from layerwise.files.run_files import PLACE_FILE, lock, require_usable, sweep
from layerwise.files.storage import JSON_BYTES, read_file, write_file, write_json
from layerwise.recipe.as_json import AS_WRITTEN, describe
from layerwise.recipe.loader import as_trained
from layerwise.recipe.recipe import Recipe

RUNS = Path("runs")
IN_PYTHON = "(made in Python)"
"""What run.json names in the place of a recipe, for a run of `lw.train`."""


@dataclass(frozen=True)
class Run:
    """A run directory and the recipe that it follows."""

    folder: Path
    recipe: Recipe

    def stage(self, number: int) -> Path:
        return self.folder / "stages" / str(number)

    def training(self, numbers: Sequence[int]) -> Path:
        """Where modules that are trained together keep their checkpoints and metrics."""
        return self.stage(numbers[0]) if len(numbers) == 1 else self.folder / "stages" / f"{numbers[0]}-{numbers[-1]}"

    @property
    def caches(self) -> Path:
        return self.folder / "caches"

    def cache(self, number: int) -> Path | str:
        """In the run's own folder, or below the URL that the recipe names, in a folder that is this run's own."""
        return cache_location(self.folder, self.recipe.cache.url, number)

    def window(self, number: int) -> Path:
        """The rolling window on a cache that does not fit the disk."""
        return window_location(self.folder, self.recipe.cache.url, number)

    def probe(self, of: int | str) -> Path:
        """Of a module's representation, or of fixed features."""
        return self.folder / "probes" / f"{of}.json"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def data_dir(self) -> Path | None:
        """Where the dataset lay when this run was last used."""
        known = read_record(self.folder / "run.json", RUN)
        return None if known is None or known["data_dir"] is None else Path(known["data_dir"])

    def follow(self, source: str, overrides: Sequence[str], data_dir: Path | None, as_written: Recipe) -> None:
        """Note which recipe this run follows from now on, where it came from, each of its fields, before and after
        overrides, method and scale, and the dataset's place.
        """
        place = None if data_dir is None else str(data_dir.resolve())
        write_json(self.folder / "run.json", {"recipe": source, "set": list(overrides), "data_dir": place})
        write_json(self.folder / "recipe.json", {**describe(self.recipe), AS_WRITTEN: describe(as_written)})

    @contextmanager
    def following(
        self, source: str, overrides: Sequence[str], data_dir: Path | None, as_written: Recipe
    ) -> Iterator[None]:
        """Follow this recipe from now on, unless the block refuses it: then the run follows the one it did before."""
        paths = [self.folder / name for name in ("run.json", "recipe.json", "expected.json")]
        kept = {path: content for path in paths if (content := read_file(path, JSON_BYTES)) is not None}
        last = {override.partition("=")[0].strip(): override for override in overrides}
        self.follow(source, list(last.values()), data_dir, as_written)
        try:
            yield
        except (UsageError, NotReady, WillNotFit):
            for path, content in kept.items():
                write_file(path, content)
            raise

    @contextmanager
    def locked(self, purpose: str) -> Iterator[None]:
        """Hold the run while the block runs. The lock dies with the process.

        Raises:
            RunLocked: another process holds it; the message says which and for what.
            UsageError: the folder is no run, and holds something that a run would write over.
            DamagedData: a link or something else lies in the place of a file or folder of the run.
        """
        require_usable(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder, purpose):
            sweep(self.folder)
            yield


def cache_location(folder: Path, url: str | None, number: int) -> Path | str:
    """Where the cache of module `number` of the run in `folder` lies; `url` is the recipe's cache.url."""
    return folder / "caches" / str(number) if url is None else f"{url.rstrip('/')}/{cache_folder(folder)}/{number}"


def window_location(folder: Path, url: str | None, number: int) -> Path:
    """Where a rolling window lies: beside its cache, or in the run where that is on an object store, since a window is
    read and written too often to lie there.
    """
    if url is None or not url.startswith("file://"):
        return folder / "caches" / f"{number}-window"
    return Path(f"{cache_location(folder, url, number)}-window".removeprefix("file://"))


def cache_folder(folder: Path) -> str:
    """The folder below cache.url that holds the caches of the run in `folder`: as noted in the run, else of its name.

    Raises:
        DamagedData: the note is not what was written.
    """
    known = read_record(folder / PLACE_FILE, PLACE)
    return known["name"] if known is not None else os.path.basename(os.path.abspath(folder))  # `.` has no name itself


def run_name(recipe: Recipe) -> str:
    """The folder's default name: another method, schedule or scale of a recipe has a run of its own."""
    method = "" if recipe.method == "gim" else f"-{recipe.method}"
    schedule = "" if recipe.schedule == "iterative" else f"-{recipe.schedule}"
    return f"{recipe.name}{method}{schedule}" + ("" if recipe.scale == 1 else f"-scale{recipe.scale:g}")


def open_run(folder: Path, recipe: Recipe) -> Run:
    """The run at `folder`, which need not exist yet.

    Raises:
        UsageError: the folder holds a run of another recipe, or is no run and holds something that a run would write
            over.
    """
    require_usable(folder)
    recipe = as_trained(recipe)
    known = read_record(folder / "recipe.json", RECIPE)
    if known is not None and known["name"] != recipe.name:
        raise UsageError(
            f"{folder} holds a run of the recipe {known['name']!r}, not of {recipe.name!r}: choose another --run-dir"
        )
    return Run(folder, recipe)


def run_source(folder: Path) -> tuple[str, list[str]]:
    """The recipe (name or path) and the overrides that a run was last used with.

    Raises:
        NotReady: there is no run.
        UsageError: the folder is no run, and holds something that a run would write over.
    """
    require_usable(folder)
    known = read_record(folder / "run.json", RUN)
    if known is None:
        raise NotReady(f"{folder} is not a run. Name a recipe, for example: layerwise run --recipe digits")
    return known["recipe"], known["set"]


def remember_last(folder: Path) -> None:
    """So that a later command here may leave out the run."""
    write_json(RUNS / ".last.json", {"run": str(folder.resolve())})


def last_run() -> Path:
    """The run that was used last in this working directory.

    Raises:
        NotReady: there was none.
    """
    known = read_record(RUNS / ".last.json", LAST)
    if known is None:
        raise NotReady(
            f"there is no last used run in {Path.cwd()}. Name a recipe, for example: layerwise run --recipe digits"
        )
    folder = Path(known["run"])
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
