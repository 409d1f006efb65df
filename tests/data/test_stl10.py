from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise.data import stl10
from layerwise.data.download import Archive
from layerwise.data.images import ArrayImages
from layerwise.data.stl10 import STL10
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.pipeline.frozen import stage_record
from layerwise.pipeline.probe import probe_module, probe_record
from layerwise.pipeline.run import open_run
from layerwise.pipeline.schedule import run_stage
from layerwise.pipeline.setup import Setup
from layerwise.recipe import MethodName
from layerwise.recipe.loader import load_recipe
from layerwise.recipe.methods import with_method
from tests.conftest import TINY

COUNTS = {"unlabeled": 40, "train": 20, "test": 10}


def write(folder: Path, counts: dict[str, int] = COUNTS) -> Path:
    """Random pictures in STL-10's format, written as its description says: channel by channel, column by column."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in counts.items():
        pictures = draw.integers(0, 256, (count, 96, 96, 3), np.uint8)  # rows, columns, channels, as a person would
        np.save(folder.parent / f"{name}.npy", pictures)
        (folder / f"{name}_X.bin").write_bytes(
            b"".join(
                picture[:, column, channel].tobytes()
                for picture in pictures
                for channel in range(3)
                for column in range(96)
            )
        )
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "stl10_binary")
    return tmp_path


def open_(data: Path | None, *, seed: int = 0, download: bool = False, **settings: Any) -> Any:
    return STL10(**settings).open(data, download=download, seed=seed)


def test_pictures_are_upright_and_in_colour(data: Path) -> None:
    splits = open_(data, crop=96, grayscale=False, mean=(0.0,), std=(1.0,))
    wanted = np.load(data / "test.npy")

    found = splits.test.batch(np.arange(10), None)

    assert splits.test.sample_shape == (3, 96, 96)
    assert torch.equal(found, torch.from_numpy(wanted).permute(0, 3, 1, 2).float() / 255)
    assert splits.test.labels["class"].tolist() == list(range(10))


def test_grey_is_luma_standardised(data: Path) -> None:
    splits = open_(data)
    wanted = [
        np.asarray(Image.fromarray(picture).convert("L"), np.float32)[16:80, 16:80]
        for picture in np.load(data / "test.npy")
    ]

    found = splits.test.batch(np.arange(10), None)[:, 0] * 0.2570 + 0.4120

    assert found.shape == (10, 64, 64)
    assert np.abs(found.numpy() * 255 - np.stack(wanted)).max() < 1  # Pillow rounds to whole levels


def test_sizes_and_disjoint_stages(data: Path) -> None:
    splits = open_(data, validation=0.25)

    assert {name: len(split) for name, split in splits.named().items()} == {
        "train": 30,
        "validation": 10,
        "probe": 20,
        "test": 10,
    }
    assert sorted([*splits.train.ids, *splits.validation.ids]) == [f"unlabeled-{row:06d}" for row in range(40)]
    assert splits.train.labels == {}
    assert splits.classes == {"class": 10}


@pytest.mark.parametrize("grayscale", [True, False])
def test_what_is_expected_is_what_comes(data: Path, grayscale: bool) -> None:
    settings = STL10(grayscale=grayscale, crop=48)
    splits = settings.open(data, download=False, seed=0)
    assert settings.expects() == (splits.train.sample_shape, splits.classes)


def test_limits(data: Path) -> None:
    splits = open_(data, max_train=8, max_probe=7, max_test=3, validation=0.25)

    assert {name: len(split) for name, split in splits.named().items()} == {
        "train": 6,
        "validation": 2,
        "probe": 7,
        "test": 3,
    }
    assert list(splits.test.labels["class"]) == [int(name.removeprefix("test-")) % 10 for name in splits.test.ids]


def test_the_choice_of_pictures_does_not_depend_on_the_seed_and_views_do(data: Path) -> None:
    first, second = open_(data, seed=1), open_(data, seed=2)

    assert first.train.ids == second.train.ids
    assert first.train.manifest() == second.train.manifest()
    rows = np.arange(4)
    assert torch.equal(first.train.batch(rows, 3), open_(data, seed=1).train.batch(rows, 3))
    assert not torch.equal(first.train.batch(rows, 3), second.train.batch(rows, 3))
    assert not torch.equal(first.train.batch(rows, 3), first.train.batch(rows, 4))


def test_every_byte_is_in_the_manifest(data: Path) -> None:
    before = {name: split.manifest() for name, split in open_(data).named().items()}
    for name, splits in (
        ("unlabeled_X.bin", {"train", "validation"}),
        ("train_X.bin", {"probe"}),
        ("train_y.bin", {"probe"}),
        ("test_y.bin", {"test"}),
    ):
        path = data / "stl10_binary" / name
        content = bytearray(path.read_bytes())
        content[-1] = content[-1] % 9 + 1  # another value, and a label if it is one
        whole = path.read_bytes()
        path.write_bytes(bytes(content))
        after = {name: split.manifest() for name, split in open_(data).named().items()}
        path.write_bytes(whole)
        changed = {name for name in before if before[name] != after[name]}
        assert changed
        assert changed <= splits


def test_a_file_is_mapped_and_not_read(data: Path) -> None:
    path = data / "stl10_binary" / "unlabeled_X.bin"
    with path.open("r+b") as file:
        file.truncate(stl10.PICTURE * 20_000_000)  # 553 GB of holes
    pictures = stl10.map_pictures(path)

    assert pictures.shape == (20_000_000, 3, 96, 96)
    assert pictures[19_999_999].sum() == 0


@pytest.mark.parametrize("below", ["", "stl10_binary"])
def test_either_folder_will_do(data: Path, below: str) -> None:
    assert len(open_(data / below).test) == 10


def test_says_that_it_is_not_the_original(data: Path) -> None:
    (note,) = open_(data).notes

    assert note.endswith(
        "not the original: it has 40 instead of 100,000 unlabeled, 20 instead of 5,000 train, "
        "10 instead of 8,000 test pictures"
    )


def test_the_original_counts_with_other_labels_are_not_the_original(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stl10, "ORIGINAL", COUNTS)
    assert open_(data).notes[0].endswith("not the original: train_y.bin has other labels")

    digests = {
        name: hashlib.md5((data / "stl10_binary" / f"{name}_y.bin").read_bytes()).hexdigest() for name in stl10.LABELLED
    }
    monkeypatch.setattr(stl10, "ORIGINAL_LABELS", digests)
    assert open_(data).notes == ()


def test_missing_files_are_listed_with_both_ways_to_get_them(data: Path) -> None:
    (data / "stl10_binary" / "train_y.bin").unlink()
    (data / "stl10_binary" / "unlabeled_X.bin").unlink()

    with pytest.raises(NotReady) as raised:
        open_(data)
    assert str(raised.value) == (
        f"{data}/stl10_binary lacks unlabeled_X.bin, train_y.bin. "
        f"Either add --download --data-dir {data}, which fetches 2.5 GiB, "
        f"or fetch {stl10.ARCHIVE.urls[0]} and unpack it there, so that {data}/stl10_binary/unlabeled_X.bin exists"
    )


def test_without_a_folder() -> None:
    with pytest.raises(UsageError, match=r"no --data-dir was given.*--download --data-dir DIR"):
        open_(None)
    with pytest.raises(UsageError, match="name a folder with --data-dir DIR"):
        open_(None, download=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "unlabeled_X.bin",
            lambda old: old[:-1],
            "has 1,105,919 bytes: 39 pictures of 27,648 bytes and 27,647 bytes over",
        ),
        ("test_X.bin", lambda old: old + b"?", "has 276,481 bytes: 10 pictures of 27,648 bytes and 1 bytes over"),
        ("train_X.bin", lambda old: b"", "has 0 bytes"),
        ("train_X.bin", lambda old: old[: stl10.PICTURE * 5], "train_y.bin has 20 labels for 5 pictures"),
        ("train_y.bin", lambda old: old[:-1], "train_y.bin has 19 labels for 20 pictures"),
        ("test_y.bin", lambda old: b"\x00" + old[1:], r"label 0 of picture 0 is not one of 1 to 10 \(1 such labels\)"),
        ("test_y.bin", lambda old: old[:-2] + b"\x0b\xff", r"label 11 of picture 8 .*\(2 such labels\)"),
    ],
)
def test_damage_is_named(data: Path, name: str, change: Any, message: str) -> None:
    path = data / "stl10_binary" / name
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(DamagedData, match=message):
        open_(data)


def test_one_picture_is_not_enough(tmp_path: Path) -> None:
    write(tmp_path / "stl10_binary", {"unlabeled": 1, "train": 3, "test": 3})
    with pytest.raises(NotReady, match="holds 1 picture"):
        open_(tmp_path)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive, as a file that can be fetched."""
    write(tmp_path / "there" / "stl10_binary")
    path = tmp_path / "there" / "stl10_binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "there" / "stl10_binary", "stl10_binary")
    content = path.read_bytes()
    monkeypatch.setattr(
        stl10, "ARCHIVE", Archive((path.as_uri(),), len(content), hashlib.sha256(content).hexdigest(), 10_000_000)
    )
    return path


@pytest.mark.parametrize("below", ["", "stl10_binary"])
def test_download(tmp_path: Path, published: Path, below: str) -> None:
    splits = open_(tmp_path / "here" / below, download=True)

    assert len(splits.train) == 38
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["stl10_binary"], "the archive is not kept"
    published.unlink()
    assert len(open_(tmp_path / "here", download=True).train) == 38, "what is there is not fetched again"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.mean=[0.4,0.4,0.4]", "mean .* must be one number, as dataset.grayscale = True"),
        ("dataset.std=[0]", "std .* must be above 0"),
        ("dataset.crop=97", "dataset.crop = 97: should be less than or equal to 96; the nearest valid value is 96"),
    ],
)
def test_bad_settings(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("stl10", [override])


def test_the_recipe_is_the_papers_network() -> None:
    """Parameters and shapes from the paper's description, counted here by hand."""
    recipe = load_recipe("stl10")
    modules = recipe.network.modules((1, 64, 64))

    def bottleneck(inputs: int, outputs: int, projects: bool) -> int:
        inner = outputs // 4
        shortcut = inputs * outputs + outputs if projects else 0
        return inputs * inner + inner + 9 * inner * inner + inner + inner * outputs + outputs + shortcut

    wanted = [25 * 64 + 64, 0, 0]
    for index, (inputs, outputs, blocks) in enumerate([(64, 256, 3), (256, 512, 4), (512, 1024, 6)]):
        wanted[index] += bottleneck(inputs, outputs, True) + (blocks - 1) * bottleneck(outputs, outputs, False)
    assert [sum(weight.numel() for weight in module.parameters()) for module in modules] == wanted

    shapes = []
    x = torch.zeros(1, 1, 64, 64)
    with torch.no_grad():
        for module in modules:
            encoded = module(x)
            shapes.append((tuple(encoded.z.shape), tuple(encoded.output.shape)))
            x = encoded.output
    assert shapes == [
        ((1, 256, 7, 7), (1, 49, 256, 16, 16)),
        ((1, 512, 7, 7), (1, 49, 512, 8, 8)),
        ((1, 1024, 7, 7), (1, 49, 1024, 4, 4)),
    ]


def test_rows_of_an_array_are_those_asked_for() -> None:
    pictures = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 1, 2, 2), np.uint8)
    split = ArrayImages(
        pictures,
        list("ab"),
        {},
        rows=np.array([4, 1]),
        crop=2,
        flip=False,
        grayscale=False,
        mean=(0,),
        std=(1 / 255,),
        seed=0,
    )
    assert split.batch(np.array([0, 1]), None)[:, 0, 0, 0].tolist() == pytest.approx([4, 1])


@pytest.mark.parametrize("method", ["gim", "supervised"])
def test_how_many_labelled_pictures_there_are_makes_stale_what_reads_them(
    method: MethodName, data: Path, tmp_path: Path
) -> None:
    def setup_with(**chosen: int) -> Setup:
        training = TINY.training.model_copy(update={"batch_size": 4, "epochs": 1})
        recipe = TINY.model_copy(update={"dataset": STL10(crop=16, **chosen), "training": training})
        return Setup(open_run(tmp_path / "run", with_method(recipe, method)), torch.device("cpu"), data)

    run_stage(setup_with(), 1)
    probe_module(setup_with(), 1)

    fewer_tests = setup_with(max_test=5)
    assert stage_record(fewer_tests, 1) is not None
    assert probe_record(fewer_tests, 1) is None
    assert probe_module(fewer_tests, 1)["tasks"]["class"]["trained"]["test_samples"] == 5
    fewer_labels = setup_with(max_probe=10)
    assert method == "supervised" or probe_record(fewer_labels, 1) is None
    if method == "gim":
        assert stage_record(fewer_labels, 1) is not None
    else:  # they are what it is trained on
        with pytest.raises(NotReady, match="manifest"):
            stage_record(fewer_labels, 1)
