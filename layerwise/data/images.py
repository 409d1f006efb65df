"""Samples that are pictures held in one array, and the paper's way of looking at them (section 4.1).

Letters: N pictures, B batch, C channels, H and W height and width of a picture, S side of a crop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layerwise.data.dataset import IntArray, Split
from layerwise.seeding import numpy_generator

LUMA = "0.299 R + 0.587 G + 0.114 B of the cropped pixels, unrounded"
"""How `normalise` takes brightness."""


class ArrayImages(Split):
    """(N, C, H, W) uint8 pictures, or those of them at `rows`; a view is a random crop and flip, the evaluation view
    the centre crop.
    """

    def __init__(
        self,
        pictures: npt.NDArray[np.uint8],
        ids: Sequence[str],
        labels: dict[str, IntArray],
        *,
        rows: IntArray | None = None,
        crop: int,
        flip: bool,
        grayscale: bool,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        self.pictures, self.ids, self.labels = pictures, ids, labels
        self.rows = np.arange(len(pictures)) if rows is None else rows
        self.crop, self.flip, self.grayscale, self.seed = crop, flip, grayscale, seed
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.sample_shape = (1 if grayscale else pictures.shape[1], crop, crop)

    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        crops = np.stack([self._crop(int(index), view) for index in indices])
        return normalise(torch.from_numpy(crops), self.grayscale, self.mean, self.std)

    def _crop(self, index: int, view: int | None) -> npt.NDArray[np.uint8]:
        return crop_view(self.pictures[self.rows[index]], self.crop, self.flip, self.seed, self.ids[index], view)

    def manifest(self) -> str:
        digest = hashlib.sha256(repr(((len(self), *self.pictures.shape[1:]), list(self.ids))).encode())
        for row in self.rows:  # one at a time: the array may be a map of a file larger than memory
            digest.update(self.pictures[row].tobytes())
        for task in sorted(self.labels):
            digest.update(task.encode() + self.labels[task].tobytes())
        return digest.hexdigest()


def crop_view(
    picture: npt.NDArray[np.uint8], side: int, flip: bool, seed: int, sample: str, view: int | None
) -> npt.NDArray[np.uint8]:
    """(C, H, W) to (C, side, side): the centre where `view` is None, else this view's random crop, mirrored half of
    the time.
    """
    height, width = picture.shape[1:]
    if view is None:
        top, left, mirrored = (height - side) // 2, (width - side) // 2, False
    else:
        draw = numpy_generator(seed, "view", sample, view)
        top, left = int(draw.integers(height - side + 1)), int(draw.integers(width - side + 1))
        mirrored = flip and bool(draw.integers(2))
    window = picture[:, top : top + side, left : left + side]
    return window[:, :, ::-1] if mirrored else window


def normalise(pictures: Tensor, grayscale: bool, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, S, S) uint8 to float32, standardised; luma weights of ITU-R 601 where three channels become one."""
    values = pictures.float() / 255
    if grayscale and values.shape[1] == 3:
        red, green, blue = values.unbind(1)
        values = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
    return (values - mean) / std


def check_levels(mean: Sequence[float] | None, std: Sequence[float] | None, grayscale: bool) -> None:
    """ValueError unless these can standardise pixels: one number, or one a channel, and no deviation of nothing."""
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers is not None and len(numbers) not in ((1,) if grayscale else (1, 3)):
            wanted = "one number" if grayscale else "one number or three"
            raise ValueError(f"{name} {tuple(numbers)} must be {wanted}, as dataset.grayscale = {grayscale}")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std {tuple(std)} must be above 0")
