"""Datasets that were not made for this toolkit, and their global random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from layerwise.data.dataset import Splits
from layerwise.data.mapped import MappedSplit
from layerwise.errors import DamagedData, UsageError
from layerwise.training.feeds import DatasetFeed


class Augmented:
    """Draws from all three global generators, as other people's datasets do."""

    transform = v2.Compose([v2.RandomCrop(6), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.arange(64.0).reshape(1, 8, 8) + 100 * index
        return self.transform(image) + np.random.rand() + random.random(), index % 3


def read(split: MappedSplit, epoch: int = 0, start: int = 0) -> list[Tensor]:
    feed = DatasetFeed(Splits(split, split), 8, seed=1)
    return [batch.inputs for batch in feed.shuffled(epoch, start)]


def test_a_view_is_the_same_whoever_reads_it_and_whenever() -> None:
    whole = read(MappedSplit(Augmented(), "train", 0))
    torch.rand(3), np.random.rand(2), random.random()
    assert all(map(torch.equal, whole, read(MappedSplit(Augmented(), "train", 0))))
    assert all(map(torch.equal, whole[2:], read(MappedSplit(Augmented(), "train", 0), start=2)))
    assert all(map(torch.equal, whole, read(MappedSplit(Augmented(), "train", 0, workers=2))))
    assert not any(map(torch.equal, whole, read(MappedSplit(Augmented(), "train", 0), epoch=1)))
    assert not any(map(torch.equal, whole, read(MappedSplit(Augmented(), "train", 1))))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generators_as_they_were(workers: int) -> None:
    def draws() -> tuple[Any, ...]:
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    wanted = draws()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    read(MappedSplit(Augmented(), "train", 0, workers=workers))
    assert draws() == wanted


def test_a_training_thread_that_draws_meanwhile_changes_nothing() -> None:
    feed = DatasetFeed(Splits(*[MappedSplit(Augmented(), "train", 0)] * 2), 8, seed=1)
    found = []
    for batch in feed.shuffled(0):
        torch.nn.functional.dropout(torch.ones(10000))
        found.append(batch.inputs)
    assert all(map(torch.equal, found, read(MappedSplit(Augmented(), "train", 0))))


PICTURE = Image.fromarray(np.full((4, 5, 3), 255, np.uint8))


@pytest.mark.parametrize(
    ("sample", "shape", "labels"),
    [
        (torch.zeros(3, 4), (3, 4), {}),
        ((torch.zeros(3, 4),), (3, 4), {}),
        ((np.zeros((3, 4)), 7), (3, 4), {"class": 7}),
        ((PICTURE, torch.tensor(2)), (3, 4, 5), {"class": 2}),
        ({"image": PICTURE, "label": 4, "file": "a.png"}, (3, 4, 5), {"label": 4}),
        ({"input_ids": torch.arange(5)}, (5,), {}),
    ],
)
def test_the_usual_forms_of_a_sample(sample: Any, shape: tuple[int, ...], labels: dict[str, int]) -> None:
    split = MappedSplit([sample] * 3, "train", 0)
    assert split.sample_shape == shape
    values = split.batch(np.array([0, 2]), None)
    assert values.shape == (2, *shape)
    assert values.dtype == (torch.int64 if isinstance(sample, dict) and "input_ids" in sample else torch.float32)
    assert values.max() <= 4
    assert {task: set(known.tolist()) for task, known in split.labels.items()} == {t: {n} for t, n in labels.items()}


def test_labels_that_lie_apart_are_not_read_from_the_samples() -> None:
    class Apart(Augmented):
        targets = tuple(range(40))
        read = 0

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            type(self).read += 1
            return super().__getitem__(index)

    split = MappedSplit(Apart(), "train", 0)
    assert split.labels["class"].tolist() == list(range(40))
    assert Apart.read == 1


def test_the_manifest_changes_with_the_content() -> None:
    def manifest(values: Tensor) -> str:
        return MappedSplit(TensorDataset(values, torch.arange(len(values))), "train", 0).manifest()

    values = torch.arange(30.0).reshape(10, 3)
    changed = values.clone()
    changed[4, 1] += 1
    assert manifest(values) == manifest(values.clone())
    assert len({manifest(values), manifest(changed), manifest(values[:9])}) == 3


def test_what_cannot_be_read_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="a tuple of 3, but this takes"):
        MappedSplit([(1.0, 2.0, 3.0)], "train", 0)
    with pytest.raises(UsageError, match="dict with 2 inputs \\(left, right\\)"):
        MappedSplit([{"left": torch.zeros(2), "right": torch.zeros(2)}], "train", 0)
    with pytest.raises(UsageError, match="is empty"):
        MappedSplit([], "train", 0)
    split = MappedSplit([torch.zeros(2), torch.zeros(3)], "train", 0)
    with pytest.raises(DamagedData, match=r"sample 1 of the train dataset has shape \(3,\), but sample 0 has \(2,\)"):
        split.batch(np.array([0, 1]), None)


def test_a_function_reads_any_other_form() -> None:
    split = MappedSplit([(torch.zeros(2), 1.5, 3)], "train", 0, read=lambda sample: (sample[0], {"rank": sample[2]}))
    assert split.labels["rank"].tolist() == [3]
