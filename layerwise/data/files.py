"""Samples that are picture files, or windows of them, decoded when they are asked for.

Letters: B batch, C channels, S side of a crop.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerwise.data.dataset import IntArray, Split
from layerwise.data.decode import MOST_PIXELS, Unreadable, decode, window
from layerwise.data.images import normalise
from layerwise.data.seen import Facts, legible, look_through
from layerwise.errors import DamagedData
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator

if TYPE_CHECKING:
    from PIL.Image import Image

USUAL_LEVELS = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
"""Channels to mean and deviation of photographs (ImageNet's)."""


class Picture(NamedTuple):
    """A file that could be read."""

    name: str
    """Path from the data directory on."""
    folder: str | None
    """The sub-folder that it is in, of the folder that all pictures of its purpose are in; None: in that itself."""
    sha256: str
    width: int
    """Of the upright picture, pixels."""
    height: int

    @property
    def id(self) -> str:
        return legible(self.name)


class Region(NamedTuple):
    """A part of a picture that is one sample, pixels from its upper left corner."""

    picture: Picture
    left: int
    top: int
    width: int
    height: int


class PictureSettings(Protocol):
    """How pictures are read and cropped; `ImageFolder` says what each field means."""

    @property
    def resize(self) -> int | None: ...
    @property
    def crop(self) -> int: ...
    @property
    def tile(self) -> int | None: ...
    @property
    def flip(self) -> bool: ...
    @property
    def grayscale(self) -> bool: ...
    @property
    def mean(self) -> tuple[float, ...] | None: ...
    @property
    def std(self) -> tuple[float, ...] | None: ...
    @property
    def max_pixels(self) -> int: ...
    @property
    def memory(self) -> int: ...


@dataclass(frozen=True)
class Framing:
    """How pictures are read by a dataset whose own are not files: brought to a size, and cropped."""

    resize: int | None
    crop: int
    grayscale: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    tile: int | None = None
    flip: bool = False
    max_pixels: int = MOST_PIXELS
    memory: int = 2**26


class PictureStore:
    """Decoded pictures, the latest of them kept up to a number of bytes; any number of threads may ask."""

    def __init__(self, data_dir: Path, settings: PictureSettings) -> None:
        self._data_dir, self._settings = data_dir, settings
        self._lock = Lock()
        self._kept: OrderedDict[str, Future[Image]] = OrderedDict()
        self._bytes = 0

    def get(self, picture: Picture) -> Image:
        """
        Raises:
            DamagedData: the file is not what it was when the dataset was opened.
        """
        with self._lock:
            known = self._kept.get(picture.name)
            if known is not None:
                self._kept.move_to_end(picture.name)
            else:
                ours = self._kept[picture.name] = Future()
        if known is not None:
            return known.result()
        try:
            image = self._decode(picture)
        except BaseException as error:
            ours.set_exception(error)
            raise
        ours.set_result(image)
        self._keep(image)
        return image

    def _keep(self, image: Image) -> None:
        with self._lock:
            self._bytes += _bytes_of(image)
            while self._bytes > self._settings.memory and self._kept:
                name, oldest = next(iter(self._kept.items()))
                if not oldest.done():
                    return  # on its way, and will come by here
                del self._kept[name]
                if oldest.exception() is None:
                    self._bytes -= _bytes_of(oldest.result())

    def _decode(self, picture: Picture) -> Image:
        settings, path = self._settings, self._data_dir / picture.name
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != picture.sha256:
                raise DamagedData(f"{str(path)!r} has changed since the dataset was opened; run the command again")
            # Only a whole picture may come smaller: tiles are measured in the file's own pixels.
            short_side = max(settings.resize, settings.crop) if settings.resize and not settings.tile else None
            return decode(content, grayscale=settings.grayscale, max_pixels=settings.max_pixels, short_side=short_side)
        except (OSError, Unreadable) as error:
            raise DamagedData(
                f"{str(path)!r} could be read when the dataset was opened, but cannot be read now: {error}"
            ) from error


def _bytes_of(image: Image) -> int:
    return image.width * image.height * (1 if image.mode == "L" else 4)  # Pillow keeps RGB in four bytes


class FolderImages(Split):
    """Pictures, or their tiles; a view is a random crop and flip, the evaluation view the centre crop."""

    def __init__(
        self,
        store: PictureStore,
        pictures: Sequence[Picture],
        classes: Sequence[str],
        settings: PictureSettings,
        seed: int,
    ) -> None:
        self._store, self._pictures, self._settings, self._seed = store, pictures, settings, seed
        self._regions = [region for picture in pictures for region in regions(picture, settings.tile)]
        self.ids = [_name(region, settings.tile) for region in self._regions]
        self.labels: dict[str, IntArray] = {}
        if classes:
            number = {name: index for index, name in enumerate(classes)}
            self.labels["class"] = np.array([number[region.picture.folder or ""] for region in self._regions], np.int64)
        channels = 1 if settings.grayscale else 3
        mean, std = USUAL_LEVELS[channels]
        self._mean = torch.tensor(settings.mean or mean).view(-1, 1, 1)
        self._std = torch.tensor(settings.std or std).view(-1, 1, 1)
        self.sample_shape = (channels, settings.crop, settings.crop)

    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        crops = np.stack([self._crop(int(index), view) for index in indices])
        return normalise(torch.from_numpy(crops), self._settings.grayscale, self._mean, self._std)

    def _crop(self, index: int, view: int | None) -> npt.NDArray[np.uint8]:
        region, settings, crop = self._regions[index], self._settings, self._settings.crop
        image = self._store.get(region.picture)
        # The decoder may have halved the picture: measure what there is.
        left, top = (0, 0) if settings.tile is None else (region.left, region.top)
        width, height = image.size if settings.tile is None else (region.width, region.height)
        scale = max(settings.resize or min(width, height), crop) / min(width, height)
        spare = [max(round(side * scale) - crop, 0) for side in (width, height)]
        if view is None:
            right, down, mirrored = spare[0] // 2, spare[1] // 2, False
        else:
            draw = numpy_generator(self._seed, "view", self.ids[index], view)
            right, down = (int(draw.integers(room + 1)) for room in spare)
            mirrored = settings.flip and bool(draw.integers(2))
        x, y = (min(offset / scale, side - crop / scale) for offset, side in ((right, width), (down, height)))
        x, y, side = max(x, 0.0), max(y, 0.0), crop / scale
        box = (left + x, top + y, min(left + x + side, image.width), min(top + y + side, image.height))
        pixels = window(image, box, crop)
        return pixels[:, :, ::-1] if mirrored else pixels

    def manifest(self) -> str:
        digest = hashlib.sha256()
        for picture in self._pictures:
            digest.update(repr(tuple(picture)).encode("utf-8", "backslashreplace"))
        for task, values in self.labels.items():
            digest.update(task.encode() + values.tobytes())
        return digest.hexdigest()


def regions(picture: Picture, tile: int | None) -> Iterator[Region]:
    """The whole picture, or windows of at most `tile` x `tile` that cover it, the last of a row moved in to fit."""
    if tile is None:
        yield Region(picture, 0, 0, picture.width, picture.height)
        return
    width, height = min(tile, picture.width), min(tile, picture.height)
    for top in _starts(picture.height, height):
        for left in _starts(picture.width, width):
            yield Region(picture, left, top, width, height)


def _starts(length: int, size: int) -> list[int]:
    starts = list(range(0, length - size + 1, size))
    return starts if starts[-1] + size == length else [*starts, length - size]


def _name(region: Region, tile: int | None) -> str:
    return region.picture.id if tile is None else f"{region.picture.id}@{region.left},{region.top}"


def picture_files(
    files: Sequence[Path], settings: PictureSettings, progress: Progress = SILENT, *, decoded: PictureSettings
) -> FolderImages:
    """These files, each a sample, or as many as it has tiles; named by their paths.

    Args:
        decoded: the settings that the files are decoded by, where brightness is taken later than in the decoder.

    Raises:
        DamagedData: a file cannot be read; the message says why.
    """

    def look_at(content: bytes) -> Facts:
        image = decode(content, grayscale=decoded.grayscale, max_pixels=decoded.max_pixels)
        return {"width": image.width, "height": image.height}

    pictures = []
    kind = f"pictures-1-{decoded.max_pixels}"
    looked = look_through(files, kind, look_at, progress, "look at the pictures", "pictures")
    with closing(looked):
        for path, facts in zip(files, looked, strict=True):
            if not isinstance(facts, dict):
                reason = facts.strerror if isinstance(facts, OSError) else facts
                raise DamagedData(f"{legible(path)} cannot be read as a picture: {reason}")
            pictures.append(Picture(str(path), None, facts["sha256"], facts["width"], facts["height"]))
    return FolderImages(PictureStore(Path(), decoded), pictures, [], settings, 0)


def picture_steps(settings: PictureSettings, grayscale: str = "Pillow's mode L") -> dict[str, Any]:
    """What `picture_files` does to a picture, in order."""
    mean, std = USUAL_LEVELS[1 if settings.grayscale else 3]
    return {
        "kind": "image",
        "decode": "first frame, upright by its EXIF orientation, transparent parts white, 8 bits a channel",
        "channels": f"brightness: {grayscale}" if settings.grayscale else "RGB",
        "draft": "a JPEG at the smallest of its 1/1, 1/2, 1/4 and 1/8 whose shorter side is not below "
        "resize_shorter_side_pixels (Pillow's Image.draft)"
        if settings.resize and not settings.tile
        else None,
        "tile_pixels": settings.tile,
        "resize_shorter_side_pixels": settings.resize,
        "centre_crop_pixels": settings.crop,
        "crop": "k = max(resize_shorter_side_pixels or min(width, height), c) / min(width, height), c = "
        "centre_crop_pixels; left = max(round(width * k) - c, 0) // 2 / k, top likewise; "
        "Image.resize((c, c), BILINEAR, box=(left, top, left + c / k, top + c / k))",
        "divide_by": 255,
        "subtract_mean": list(settings.mean or mean),
        "divide_by_std": list(settings.std or std),
    }
