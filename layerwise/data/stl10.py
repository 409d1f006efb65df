"""STL-10 (Coates, Ng & Lee 2011): 96x96 colour photographs, 100,000 without labels, 5,000 and 8,000 of ten classes.

The files hold nothing but pictures or labels: `*_X.bin` is (N, 3, 96, 96) uint8, every channel stored column by column;
`*_y.bin` is N uint8 labels from 1 to 10. They are mapped into memory, never read whole, and any number of pictures in
this format will do.

Letters: N pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from layerwise.data.dataset import IntArray, Split, Splits
from layerwise.data.download import Archive, discard, fetch, unpack
from layerwise.data.files import Framing, picture_files, picture_steps
from layerwise.data.images import LUMA, ArrayImages, check_levels
from layerwise.data.settings import DatasetSettings
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator
from layerwise.settings.base import JsonValue, Shape, labelled_only

ARCHIVE = Archive(
    urls=(
        "https://cs.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "https://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",  # last: nothing but sha256 protects this one
    ),
    size=2_640_397_119,
    # The authors give no hash. TensorFlow Datasets states this one, with this size, in url_checksums/stl10.txt; other
    # loaders of the dataset state the same.
    sha256="f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
    unpacked=3_124_237_000,
)
FOLDER = "stl10_binary"
SIDE = 96  # pixels
PICTURE = 3 * SIDE * SIDE  # bytes
CLASSES = 10
LABELLED = ("train", "test")
FILES = ("unlabeled_X.bin", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
ORIGINAL = {"unlabeled": 100_000, "train": 5_000, "test": 8_000}
"""Pictures in the original's files."""
ORIGINAL_LABELS = {"train": "5a34089d4802c674881badbb80307741", "test": "36f9794fa4beb8a2c72628de14fa638e"}
"""md5 of the original's label files, as published."""


class STL10(DatasetSettings):
    """Stages train on the unlabelled images, probes on the labelled ones; `--data-dir` holds `stl10_binary`."""

    crop: int = Field(64, ge=8, le=SIDE, description="side of a random crop, pixels")
    flip: bool = Field(True, description="mirror half of the views at random")
    grayscale: bool = Field(True, description="convert to one channel")
    mean: tuple[float, ...] = Field(
        (0.4120,), description="mean of pixel values from 0 to 1, one number or one a channel, that is subtracted"
    )
    std: tuple[float, ...] = Field(
        (0.2570,),
        description="deviation of pixel values from 0 to 1, one number or one a channel, that they are divided by",
    )
    validation: float = Field(0.05, gt=0, lt=1, description="fraction of the training images held out for validation")
    max_train: int | None = Field(
        None, ge=2, le=10**6, description="number of training and validation images; null: all"
    )
    max_probe: int | None = labelled_only(
        None, ge=1, le=10**6, description="number of labelled training images; null: all"
    )
    max_test: int | None = labelled_only(None, ge=1, le=10**6, description="number of test images; null: all")

    @model_validator(mode="after")
    def _numbers_for_each_channel(self) -> STL10:
        check_levels(self.mean, self.std, self.grayscale)
        return self

    def expects(self) -> tuple[Shape, dict[str, int]]:
        return (1 if self.grayscale else 3, self.crop, self.crop), {"class": CLASSES}

    def published_sizes(self) -> dict[str, int]:
        taken = min(self.max_train or ORIGINAL["unlabeled"], ORIGINAL["unlabeled"])
        held_out = self._held_out(taken)
        return {
            "train": taken - held_out,
            "validation": held_out,
            "probe": min(self.max_probe or ORIGINAL["train"], ORIGINAL["train"]),
            "test": min(self.max_test or ORIGINAL["test"], ORIGINAL["test"]),
        }

    def _held_out(self, pictures: int) -> int:
        return min(max(round(pictures * self.validation), 1), pictures - 1)

    @property
    def _framing(self) -> Framing:
        return Framing(SIDE, self.crop, self.grayscale, self.mean, self.std)

    def of_files(self, files: Sequence[Path], progress: Progress = SILENT) -> Split:
        colour = dataclasses.replace(self._framing, grayscale=False)  # brightness is taken of the crop, unrounded
        return picture_files(files, self._framing, progress, decoded=colour)

    def preprocessing(self) -> dict[str, JsonValue]:
        return picture_steps(self._framing, LUMA)

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        folder = find_files(data_dir, download=download, progress=progress)
        pictures = {name: map_pictures(folder / f"{name}_X.bin") for name in ORIGINAL}
        labels = {name: read_labels(folder / f"{name}_y.bin", len(pictures[name])) for name in LABELLED}

        def split(name: str, rows: IntArray) -> ArrayImages:
            return ArrayImages(
                pictures[name],
                [f"{name}-{row:06d}" for row in rows],
                {"class": labels[name][rows]} if name in labels else {},
                rows=rows,
                crop=self.crop,
                flip=self.flip,
                grayscale=self.grayscale,
                mean=self.mean,
                std=self.std,
                seed=seed,
            )

        # The choice of pictures is the dataset's own: it is the same for every seed of the training.
        chosen = numpy_generator(0, "stl10", "unlabeled").permutation(len(pictures["unlabeled"]))[: self.max_train]
        held_out = self._held_out(len(chosen))
        if held_out < 1:
            raise NotReady(
                f"{folder / 'unlabeled_X.bin'} holds {len(pictures['unlabeled'])} picture; stages need two or more"
            )
        return Splits(
            train=split("unlabeled", np.sort(chosen[held_out:])),
            validation=split("unlabeled", np.sort(chosen[:held_out])),
            probe=split("train", _some(len(pictures["train"]), self.max_probe, "train")),
            test=split("test", _some(len(pictures["test"]), self.max_test, "test")),
            classes={"class": CLASSES},
            notes=tuple(_not_the_original(folder, {name: len(found) for name, found in pictures.items()})),
        )


def find_files(data_dir: Path | None, *, download: bool, progress: Progress) -> Path:
    """The folder with the five files, fetched first where that is asked for.

    Raises:
        NotReady: files are missing; the message says which, and how to get them.
        UsageError: there is no `data_dir`.
    """
    if data_dir is None:
        if download:
            raise UsageError(
                f"--download fetches STL-10 ({ARCHIVE.size / 2**30:.1f} GiB): name a folder with --data-dir DIR"
            )
        raise UsageError(f"the recipe needs STL-10, and no --data-dir was given. {_ways(Path('DIR'))}")
    folder = _folder(data_dir)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing and download:
        parent = folder.parent if folder.name == FOLDER else data_dir
        archive = fetch(ARCHIVE, parent, progress)
        unpack(archive, parent, progress)
        discard(archive)
        folder = parent / FOLDER
        missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise NotReady(f"{folder} lacks {', '.join(missing)}. {_ways(data_dir)}")
    return folder


def _folder(data_dir: Path) -> Path:
    """Both the folder that holds `stl10_binary` and that folder itself may be given."""
    below = data_dir / FOLDER
    itself = data_dir.name == FOLDER or any((data_dir / name).exists() for name in FILES)
    return data_dir if itself and not below.is_dir() else below


def _ways(data_dir: Path) -> str:
    data_dir = data_dir.parent if data_dir.name == FOLDER else data_dir
    return (
        f"Either add --download --data-dir {shlex.quote(str(data_dir))}, which fetches {ARCHIVE.size / 2**30:.1f} GiB, "
        f"or fetch {ARCHIVE.urls[0]} and unpack it there, so that {data_dir / FOLDER / FILES[0]} exists"
    )


def map_pictures(path: Path) -> npt.NDArray[np.uint8]:
    """(N, 3, 96, 96) rows before columns, mapped into memory.

    Raises:
        DamagedData: the file does not hold a whole number of pictures.
    """
    size = path.stat().st_size
    whole, rest = divmod(size, PICTURE)
    if rest or not whole:
        raise DamagedData(
            f"{path} has {size:,} bytes: {whole:,} pictures of {PICTURE:,} bytes and {rest:,} bytes over. "
            "It was cut short or is another file; get it again"
        )
    return np.memmap(path, np.uint8, "r", shape=(whole, 3, SIDE, SIDE)).transpose(0, 1, 3, 2)


def read_labels(path: Path, pictures: int) -> IntArray:
    """(N,) labels from 0 to 9.

    Raises:
        DamagedData: the file has another number of labels than there are pictures, or a label out of 1 to 10.
    """
    labels = np.fromfile(path, np.uint8)
    if len(labels) != pictures:
        raise DamagedData(
            f"{path} has {len(labels):,} labels for {pictures:,} pictures; get the two files again, together"
        )
    wrong = np.flatnonzero((labels < 1) | (labels > CLASSES))
    if len(wrong):
        raise DamagedData(
            f"{path}: label {labels[wrong[0]]} of picture {wrong[0]} is not one of 1 to {CLASSES} "
            f"({len(wrong):,} such labels); get the file again"
        )
    return labels.astype(np.int64) - 1


def _some(pictures: int, most: int | None, name: str) -> IntArray:
    """Rows of at most so many pictures, drawn at random, in their order."""
    return np.sort(numpy_generator(0, "stl10", name).permutation(pictures)[:most])


def _not_the_original(folder: Path, counts: dict[str, int]) -> list[str]:
    found = [
        f"{counts[name]:,} instead of {count:,} {name}" for name, count in ORIGINAL.items() if counts[name] != count
    ]
    if found:
        return [f"{folder} is in STL-10's format but is not the original: it has {', '.join(found)} pictures"]
    for name, md5 in ORIGINAL_LABELS.items():
        if hashlib.md5((folder / f"{name}_y.bin").read_bytes(), usedforsecurity=False).hexdigest() != md5:
            return [f"{folder} is in STL-10's format but is not the original: {name}_y.bin has other labels"]
    return []
