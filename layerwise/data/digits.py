"""The handwritten digits bundled with scikit-learn: 1,797 real 8x8 scans, here enlarged to 32x32 (Alpaydin & Kaynak
1998).

The embedded default: nothing to download. Three tenths are the test set, and a tenth of the others validates the
stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from layerwise.data.dataset import IntArray, Split, Splits
from layerwise.data.files import Framing, picture_files, picture_steps
from layerwise.data.images import ArrayImages
from layerwise.data.settings import DatasetSettings
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator
from layerwise.settings.base import JsonValue, Shape

MEAN, STD = (0.305,), (0.355,)  # of pixel values from 0 to 1


class Digits(DatasetSettings):
    """The 1,797 handwritten digits that are part of scikit-learn."""

    side: int = Field(36, ge=8, le=1024, description="pixels to which the 8x8 scans are enlarged, bilinearly")
    crop: int = Field(32, ge=8, le=1024, description="side of a random crop, pixels")
    samples: int | None = Field(None, ge=100, le=10**6, description="number of digits; null: all 1,797")

    @model_validator(mode="after")
    def _crop_fits(self) -> Digits:
        if self.crop > self.side:
            raise ValueError(f"crop {self.crop} must be at most side, {self.side}")
        return self

    def heeds(self) -> frozenset[str]:
        return frozenset()

    def expects(self) -> tuple[Shape, dict[str, int]]:
        return (1, self.crop, self.crop), {"class": 10}

    @property
    def _framing(self) -> Framing:
        return Framing(self.side, self.crop, True, MEAN, STD)

    def of_files(self, files: Sequence[Path], progress: Progress = SILENT) -> Split:
        return picture_files(files, self._framing, progress, decoded=self._framing)

    def preprocessing(self) -> dict[str, JsonValue]:
        return {**picture_steps(self._framing), "note": "the dataset has white strokes on black"}

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        # The shuffle is the dataset's own: the test set is the same for every seed of the training.
        order = numpy_generator(0, "digits").permutation(len(bunch.images))[: self.samples]
        scans = torch.from_numpy(bunch.images[order]).float().unsqueeze(1) * (255 / 16)
        enlarged = F.interpolate(scans, size=(self.side, self.side), mode="bilinear", align_corners=False)
        pictures = enlarged.round().clamp(0, 255).to(torch.uint8).numpy()
        labels = bunch.target[order].astype(np.int64)

        def split(chosen: IntArray) -> ArrayImages:
            return ArrayImages(
                pictures[chosen],
                [f"digit-{order[i]:04d}" for i in chosen],
                {"class": labels[chosen]},
                crop=self.crop,
                flip=False,
                grayscale=True,
                mean=MEAN,
                std=STD,
                seed=seed,
            )

        n = len(order)
        test, validation, train = np.split(np.arange(n), [n * 3 // 10, n * 3 // 10 + n * 7 // 100])
        return Splits(
            split(train), split(validation), split(np.concatenate([validation, train])), split(test), {"class": 10}
        )
