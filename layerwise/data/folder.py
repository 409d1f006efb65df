"""Any folder of pictures.

    DIR/…                       pictures, in sub-folders or not: no labels
    DIR/CLASS/…                 every picture in a sub-folder of DIR, and two or more of these: each is a class
    DIR/train/…  DIR/test/…     either of the above, twice (val/ will do for test/)

Files are decoded when they are asked for. With `tile`, a sample is a window of a picture, and never the whole of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from pydantic import Field, model_validator

from layerwise.data.dataset import Split, Splits
from layerwise.data.decode import MOST_PIXELS, SUFFIXES, decode
from layerwise.data.files import FolderImages, Picture, PictureStore, picture_files, picture_steps
from layerwise.data.images import check_levels
from layerwise.data.seen import Facts, look_through
from layerwise.data.settings import DatasetSettings
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.progress import SILENT, Progress
from layerwise.settings.base import MOST_SIDE, JsonValue, Shape, free


class ImageFolder(DatasetSettings):
    """The images in `--data-dir`."""

    resize: int | None = Field(
        96,
        ge=1,
        le=MOST_SIDE,
        description="length of the shorter side of an image, or tile, after resizing, pixels; null: not resized",
    )
    crop: int = Field(64, ge=1, le=MOST_SIDE, description="side of a random crop, pixels")
    tile: int | None = Field(
        None,
        ge=1,
        le=MOST_SIDE,
        description="side of the tiles that images are cut into, pixels of the file; null: not cut",
    )
    flip: bool = Field(True, description="mirror half of the views at random")
    grayscale: bool = Field(False, description="convert to one channel")
    mean: tuple[float, ...] | None = Field(
        None,
        description="mean of pixel values from 0 to 1, one number or one a channel, that is subtracted; null: that of "
        "photographs",
    )
    std: tuple[float, ...] | None = Field(
        None,
        description="deviation of pixel values from 0 to 1, one number or one a channel, that they are divided by; "
        "null: that of photographs",
    )
    labelled: bool = Field(True, description="sub-folders are classes, if every image is in one")
    test: float = Field(
        0.2, gt=0, lt=1, description="fraction of the images that test probes, if there is no folder test/"
    )
    validation: float = Field(0.1, gt=0, lt=1, description="fraction of the others held out for validation")
    max_pictures: int | None = Field(
        None, ge=2, le=10**9, description="maximum number of images of each folder; null: all"
    )
    max_pixels: int = Field(89_478_485, ge=1, le=MOST_PIXELS, description="an image with more pixels is not decoded")
    max_unreadable: int = free(20, ge=0, le=10**9, description="unreadable images that are tolerated and left out")
    memory: int = free(2**28, ge=0, le=2**62, description="bytes of decoded images kept in memory")

    @model_validator(mode="after")
    def _fits_together(self) -> ImageFolder:
        if self.resize is not None and self.crop > self.resize:
            raise ValueError(f"crop {self.crop} must be {self.resize} or less, as dataset.resize = {self.resize}")
        if self.tile is not None and self.resize is None and self.crop > self.tile:
            raise ValueError(f"crop {self.crop} must be {self.tile} or less, as dataset.tile = {self.tile}")
        check_levels(self.mean, self.std, self.grayscale)
        return self

    def heeds(self) -> frozenset[str]:
        return frozenset({"data_dir"})

    def expects(self) -> tuple[Shape, dict[str, int]]:
        return (1 if self.grayscale else 3, self.crop, self.crop), {}  # classes are told by the folders alone

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        if data_dir is None:
            raise UsageError("the recipe reads a folder of images: name it with --data-dir DIR")
        if not data_dir.is_dir():
            raise NotReady(f"--data-dir {str(data_dir)!r} is not a folder; it should be a folder of images")
        folders = {"train": data_dir}
        if (data_dir / "train").is_dir():
            tests = [data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()]
            folders = {"train": data_dir / "train", **({"test": tests[0]} if tests else {})}
        names = {split: self._choose(folder, data_dir) for split, folder in folders.items()}
        if not names["train"]:
            raise NotReady(f"there are no pictures in {str(folders['train'])!r}: no name there ends in {_endings()}")
        pictures, notes = self._look(data_dir, folders, names, progress)
        train, test = pictures["train"], pictures.get("test", [])
        classes = _classes(train, test) if self.labelled else []
        if classes and "test" not in folders:
            train, test = _divide(train, self.test)
        held_out = min(max(round(len(train) * self.validation), 1), len(train) - 1)
        if held_out < 1:
            raise NotReady(f"{str(folders['train'])!r} gives {len(train)} picture to train on; stages need two or more")
        store = PictureStore(data_dir, self)

        def split(chosen: Sequence[Picture]) -> FolderImages:
            return FolderImages(store, chosen, classes, self, seed)

        if not classes:
            notes.append("the pictures are not in class sub-folders: there is nothing to probe with")
        return Splits(
            train=split(train[held_out:]),
            validation=split(train[:held_out]),
            probe=split(train) if classes and test else None,
            test=split(test) if classes and test else None,
            classes={"class": len(classes)} if classes else {},
            notes=tuple(notes),
        )

    def of_files(self, files: Sequence[Path], progress: Progress = SILENT) -> Split:
        return picture_files(files, self, progress, decoded=self)

    def preprocessing(self) -> dict[str, JsonValue]:
        return picture_steps(self)

    def _choose(self, folder: Path, data_dir: Path) -> list[str]:
        """Names of the picture files, from the data directory on, in an order that has nothing to do with them."""
        names = [os.path.relpath(path, data_dir) for path in _walk(folder)]
        return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())[: self.max_pictures]

    def _look(
        self, data_dir: Path, folders: dict[str, Path], names: dict[str, list[str]], progress: Progress
    ) -> tuple[dict[str, list[Picture]], list[str]]:
        """Hash and decode every file that was not before; those that cannot be read are named in a note, up to the cap.

        Raises:
            DamagedData: more of them than `max_unreadable`.
        """
        every = [(split, name) for split in folders for name in names[split]]
        found: dict[str, list[Picture]] = {split: [] for split in folders}
        unreadable: list[str] = []
        paths, kind = [data_dir / name for _, name in every], f"pictures-1-{self.max_pixels}"
        looked = look_through(paths, kind, self._look_at, progress, "look at the pictures", "pictures")
        with closing(looked):
            for (split, name), facts in zip(every, looked, strict=True):
                if isinstance(facts, dict):
                    first, *below = (data_dir / name).relative_to(folders[split]).parts
                    size = facts["width"], facts["height"]
                    found[split].append(Picture(name, first if below else None, facts["sha256"], *size))
                    continue
                unreadable.append(f"{name!r} ({facts})")
                if len(unreadable) > self.max_unreadable:
                    raise DamagedData(
                        f"more than {self.max_unreadable} (dataset.max_unreadable) of the pictures in "
                        f"{str(data_dir)!r} cannot be read: {_some(unreadable)}"
                    )
        lost = f"{len(unreadable)} of {len(every):,} pictures cannot be read and are left out: {_some(unreadable)}"
        return found, [lost] if unreadable else []

    def _look_at(self, content: bytes) -> Facts:
        """Width and height of the upright picture, pixels."""
        image = decode(content, grayscale=self.grayscale, max_pixels=self.max_pixels)
        return {"width": image.width, "height": image.height}


def _walk(folder: Path) -> Iterator[str]:
    """Paths of the picture files in a folder, at any depth; hidden ones, and links to folders, are passed by."""

    def refuse(error: OSError) -> None:
        raise NotReady(f"{error.filename!r} cannot be listed: {error.strerror}") from error

    for parent, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(parent, name)


def _classes(train: Sequence[Picture], test: Sequence[Picture]) -> list[str]:
    """The classes, sorted by name; none where the pictures are not all in two sub-folders or more.

    Raises:
        NotReady: the test folder has classes that the training folder lacks.
    """
    known = {picture.folder for picture in train if picture.folder is not None}
    if any(picture.folder is None for picture in (*train, *test)) or len(known) < 2:
        return []
    if unknown := sorted({picture.folder for picture in test if picture.folder is not None} - known):
        raise NotReady(f"the test folder has classes that train/ lacks: {_some([repr(name) for name in unknown])}")
    return sorted(known)


def _divide(pictures: Sequence[Picture], part: float) -> tuple[list[Picture], list[Picture]]:
    """Training and test pictures: this part of every class, rounded, and one picture at least where it has two."""
    test: set[Picture] = set()
    for folder in {picture.folder for picture in pictures}:
        members = [picture for picture in pictures if picture.folder == folder]
        test.update(members[: min(max(round(len(members) * part), 1), len(members) - 1)])
    return [picture for picture in pictures if picture not in test], [
        picture for picture in pictures if picture in test
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _endings() -> str:
    return " ".join(sorted(SUFFIXES))
