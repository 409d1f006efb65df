from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layerwise.data import files
from layerwise.data.dataset import Splits
from layerwise.data.files import Picture, PictureStore, regions
from layerwise.data.folder import ImageFolder
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.progress import Silent
from layerwise.recipe.loader import load_recipe


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Noise, (width, height), written without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def classes(folder: Path, **counts: int) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for index in range(count):
            picture(folder / name / f"{index}.png", seed=1000 * number + index)
    return folder


def open_(data: Path | None, *, seed: int = 0, **settings: Any) -> Splits:
    return ImageFolder(**{"resize": None, "crop": 16, **settings}).open(data, download=False, seed=seed)


def sizes(splits: Splits) -> dict[str, int]:
    return {name: len(split) for name, split in splits.named().items()}


def folders(split: Any) -> set[str]:
    return {name.split("/")[0] for name in split.ids}


def test_class_folders_are_labels(tmp_path: Path) -> None:
    splits = open_(classes(tmp_path, cat=10, dog=10, ant=5), test=0.2, validation=0.25)

    assert sizes(splits) == {"train": 15, "validation": 5, "probe": 20, "test": 5}
    assert splits.classes == {"class": 3}
    assert splits.probe is not None
    assert splits.test is not None
    for split in splits.named().values():
        assert [["ant", "cat", "dog"][label] for label in split.labels["class"]] == [n.split("/")[0] for n in split.ids]
    assert sorted(splits.test.labels["class"].tolist()) == [0, 1, 1, 2, 2], "a fifth of every class"
    assert not set(splits.probe.ids) & set(splits.test.ids)
    assert set(splits.probe.ids) == {*splits.train.ids, *splits.validation.ids}
    assert splits.notes == ()


def test_train_and_test_folders_are_used_as_they_are(tmp_path: Path) -> None:
    classes(tmp_path / "train", cat=6, dog=4)
    classes(tmp_path / "val", dog=3)
    splits = open_(tmp_path, validation=0.2)

    assert sizes(splits) == {"train": 8, "validation": 2, "probe": 10, "test": 3}
    assert splits.test is not None
    assert splits.test.labels["class"].tolist() == [1, 1, 1]
    assert folders(splits.train) == {"train"}
    assert folders(splits.test) == {"val"}


def test_a_train_folder_alone_is_divided(tmp_path: Path) -> None:
    splits = open_(classes(tmp_path / "train", cat=5, dog=5).parent)
    assert sizes(splits) == {"train": 7, "validation": 1, "probe": 8, "test": 2}
    assert splits.classes == {"class": 2}


def test_a_class_that_cannot_be_learnt_is_refused(tmp_path: Path) -> None:
    classes(tmp_path / "train", cat=3, dog=3)
    classes(tmp_path / "test", dog=3, emu=1)
    with pytest.raises(NotReady, match="the test folder has classes that train/ lacks: 'emu'"):
        open_(tmp_path)


@pytest.mark.parametrize("layout", ["flat", "one folder", "mixed", "not wanted"])
def test_without_classes_there_are_no_probes(tmp_path: Path, layout: str) -> None:
    for index in range(6):
        inside = layout != "flat" and not (layout == "mixed" and index == 0)
        below = f"{'ab'[index % 2] if layout != 'one folder' else 'a'}/" if inside else ""
        picture(tmp_path / f"{below}{index}.png", index)

    splits = open_(tmp_path, labelled=layout != "not wanted")

    assert sizes(splits) == {"train": 5, "validation": 1}
    assert splits.classes == {}
    assert splits.train.labels == {}
    assert splits.notes == ("the pictures are not in class sub-folders: there is nothing to probe with",)


def test_the_division_depends_on_names_alone(tmp_path: Path) -> None:
    first = open_(classes(tmp_path / "one", cat=9, dog=9), seed=1)
    second = open_(classes(tmp_path / "two", dog=9, cat=9), seed=2)
    for name, split in first.named().items():
        assert split.ids == second.named()[name].ids


def test_views(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(40, 30))
    picture(tmp_path / "b.png", size=(30, 40))
    split = open_(tmp_path, mean=(0.0,), std=(1.0,), crop=16).train
    rows = np.array([0])

    fresh = [split.batch(rows, view) for view in range(6)]

    assert fresh[0].shape == (1, 3, 16, 16)
    assert fresh[0].dtype == torch.float32
    assert len({view.numpy().tobytes() for view in fresh}) > 3
    assert torch.equal(fresh[2], open_(tmp_path, mean=(0.0,), std=(1.0,), crop=16).train.batch(rows, 2))
    whole = torch.from_numpy(np.asarray(Image.open(tmp_path / split.ids[0])).copy()).permute(2, 0, 1).float() / 255
    top, left = (whole.shape[1] - 16) // 2, (whole.shape[2] - 16) // 2
    assert torch.equal(split.batch(rows, None)[0], whole[:, top : top + 16, left : left + 16])
    seen = {
        plane.numpy().tobytes()
        for plane in whole.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    }
    mirrored = 0
    for view in fresh:
        mirrored += view[0].numpy().tobytes() not in seen
        assert {view[0].numpy().tobytes(), view[0].flip(2).numpy().tobytes()} & seen, "a window, or its mirror image"
    assert 0 < mirrored < 6


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3000, 2), (7, 9), (96, 96), (97, 400)])
@pytest.mark.parametrize("resize", [None, 20])
def test_pictures_of_any_shape(tmp_path: Path, size: tuple[int, int], resize: int | None) -> None:
    for name in "ab":
        picture(tmp_path / f"{name}.png", size=size)
    split = open_(tmp_path, resize=resize).train
    for view in (None, 0, 1):
        assert split.batch(np.array([0]), view).shape == (1, 3, 16, 16)
        assert split.batch(np.array([0]), view).isfinite().all()


def test_the_shorter_side_is_brought_to_resize(tmp_path: Path) -> None:
    for name in "ab":
        ramp = np.linspace(0, 255, 400)[None, :, None] * np.ones((200, 1, 3))
        Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / f"{name}.png")
    levels = (
        open_(tmp_path, resize=50, crop=40, mean=(0.0,), std=(1.0,)).train.batch(np.array([0]), None)[0, 0, 20] * 255
    )
    # The centre crop shows 40 of 100 columns, from 30 on.
    assert levels[0].item() == pytest.approx(255 * 30.5 / 100, abs=2)
    assert levels[-1].item() == pytest.approx(255 * 69.5 / 100, abs=2)


def test_grayscale_and_the_usual_levels(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (16, 16), (10, 200, 30)).save(tmp_path / f"{name}.png")
    grey = open_(tmp_path, grayscale=True).train
    colour = open_(tmp_path).train

    assert grey.sample_shape == (1, 16, 16)
    assert (grey.batch(np.array([0]), None) * 0.226 + 0.449).mean().item() * 255 == pytest.approx(124, abs=0.6)
    channels = colour.batch(np.array([0]), None)[0].mean((1, 2)) * torch.tensor([0.229, 0.224, 0.225])
    assert ((channels + torch.tensor([0.485, 0.456, 0.406])) * 255).tolist() == pytest.approx([10, 200, 30], abs=0.01)


def test_names_of_every_kind(tmp_path: Path) -> None:
    names = ["é", "日本", "two\nlines", "tab\t", "'quote\"", " ", "~", "$(x)", "a" * 200, "\x1b[2J", "#", "%41"]
    for index, name in enumerate(names):
        picture(tmp_path / f"{name}.png", index)
    shutil.copy(tmp_path / "é.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")

    splits = open_(tmp_path)

    assert sizes(splits) == {"train": 12, "validation": 1}
    assert len({*splits.train.ids, *splits.validation.ids}) == 13
    for name in splits.train.ids:
        name.encode()
    assert splits.train.batch(np.arange(12), 0).shape[0] == 12
    assert len(splits.train.manifest()) == 64


def test_what_is_not_a_picture_is_passed_by(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.PNG")
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "d.png").write_text("x")
    (tmp_path / "fake.eps").write_text("%!PS")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert sizes(open_(tmp_path)) == {"train": 2, "validation": 1}


def test_missing_folders_and_empty_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name it with --data-dir DIR"):
        open_(None)
    with pytest.raises(NotReady, match="is not a folder"):
        open_(tmp_path / "nowhere")
    with pytest.raises(NotReady, match=r"there are no pictures in .*: no name there ends in .avif .bmp"):
        open_(tmp_path)
    picture(tmp_path / "one.png")
    with pytest.raises(NotReady, match="gives 1 picture to train on; stages need two or more"):
        open_(tmp_path)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_unreadable_pictures_are_named_and_left_out(tmp_path: Path) -> None:
    classes(tmp_path, cat=10, dog=10)
    damage(tmp_path / "cat" / "3.png")
    (tmp_path / "dog" / "two\nlines.jpg").write_bytes(b"")

    splits = open_(tmp_path)

    (note,) = splits.notes
    assert note.startswith("2 of 22 pictures cannot be read and are left out: ") or note.startswith("2 of 21")
    assert "'cat/3.png' (" in note
    assert "'dog/two\\nlines.jpg' (in no format that is read here)" in note
    assert "cat/3.png" not in {name for split in splits.named().values() for name in split.ids}


def test_too_many_unreadable_pictures_are_damage(tmp_path: Path) -> None:
    classes(tmp_path, cat=10)
    for index in range(4):
        damage(tmp_path / "cat" / f"{index}.png")

    assert len(open_(tmp_path, max_unreadable=4).notes) == 2
    with pytest.raises(
        DamagedData,
        match=r"more than 3 \(dataset.max_unreadable\) of the pictures in .* cannot be read: 'cat/\d.png' \(",
    ):
        open_(tmp_path, max_unreadable=3)


@pytest.mark.parametrize("change", ["a byte", "gone", "another picture"])
def test_a_picture_that_changes_after_it_was_looked_at_is_damage(tmp_path: Path, change: str) -> None:
    for index in range(2):
        picture(tmp_path / f"{index}.png", index)
    split = open_(tmp_path).train
    path = tmp_path / split.ids[0]
    if change == "gone":
        path.unlink()
    elif change == "a byte":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        picture(path, 99)

    with pytest.raises(DamagedData, match=f"{path}.*(has changed|cannot be read now)"):
        split.batch(np.array([0]), None)


def test_every_byte_name_and_class_is_in_the_manifest(tmp_path: Path) -> None:
    classes(tmp_path, cat=4, dog=4)
    seen = [open_(tmp_path).train.manifest()]
    assert open_(tmp_path).train.manifest() == seen[0]
    name = open_(tmp_path).train.ids[0]
    path = tmp_path / name

    content = path.read_bytes()
    path.write_bytes(content + b"\0")  # no pixel changes
    seen.append(open_(tmp_path).train.manifest())
    path.write_bytes(content)
    path.rename(path.with_name("other.png"))
    seen.append(open_(tmp_path).train.manifest())
    path.with_name("other.png").rename(path)
    (tmp_path / "cat").rename(tmp_path / "eel")
    seen.append(open_(tmp_path).train.manifest())

    assert len(set(seen)) == 4


def test_limits(tmp_path: Path) -> None:
    classes(tmp_path / "train", cat=20, dog=20)
    classes(tmp_path / "test", cat=20, dog=20)
    splits = open_(tmp_path, max_pictures=10)
    assert sizes(splits) == {"train": 9, "validation": 1, "probe": 10, "test": 10}
    assert splits.classes == {"class": 2}


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_tiles_cover_every_pixel_and_stay_inside(width: int, height: int, tile: int) -> None:
    covered = np.zeros((height, width), int)
    found = list(regions(Picture("a", None, "", width, height), tile))
    for region in found:
        assert region.left + region.width <= width
        assert region.top + region.height <= height
        assert (region.width, region.height) == (min(tile, width), min(tile, height))
        covered[region.top : region.top + region.height, region.left : region.left + region.width] += 1
    assert covered.min() >= 1
    assert len(found) == -(-width // min(tile, width)) * -(-height // min(tile, height))


def test_a_tile_is_a_sample(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / "ab"[index % 2] / f"{index}.png", index, size=(40, 33))
    splits = open_(tmp_path, tile=16, crop=16, mean=(0.0,), std=(1.0,))
    split = splits.train

    assert len(split) == 9 * 1
    assert split.ids[0].endswith("@0,0")
    assert split.ids[-1].endswith("@24,17")
    assert split.labels["class"].tolist() == [split.labels["class"][0]] * 9
    name = split.ids[0].split("@")[0]
    whole = torch.from_numpy(np.asarray(Image.open(tmp_path / name)).copy()).permute(2, 0, 1).float() / 255
    for index, own in enumerate(split.ids):
        left, top = map(int, own.split("@")[1].split(","))
        found = split.batch(np.array([index]), None)[0]
        assert torch.equal(found, whole[:, top : top + 16, left : left + 16])


def test_crops_stay_within_their_tile(tmp_path: Path) -> None:
    board = np.kron(np.arange(16).reshape(4, 4) * 15, np.ones((16, 16))).astype(np.uint8)  # one level a tile
    for name in "ab":
        Image.fromarray(board).save(tmp_path / f"{name}.png")
    split = open_(tmp_path, tile=16, crop=8, grayscale=True, mean=(0.0,), std=(1.0,)).train
    for view in (None, 0, 1, 2):
        levels = split.batch(np.arange(16), view) * 255
        assert torch.allclose(levels, (torch.arange(16.0) * 15).view(16, 1, 1, 1).expand_as(levels))


def test_tiles_of_one_picture_are_in_one_split(tmp_path: Path) -> None:
    classes(tmp_path, cat=5, dog=5)
    splits = open_(tmp_path, tile=8, crop=8)
    names = {name: {own.split("@")[0] for own in split.ids} for name, split in splits.named().items()}
    assert not names["train"] & names["validation"]
    assert not names["probe"] & names["test"]


def test_a_large_picture_is_decoded_once_for_its_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(2):
        picture(tmp_path / f"{index}.png", index, size=(1024, 1024))
    split = open_(tmp_path, tile=128, crop=128).train
    calls = []
    decode = files.decode
    monkeypatch.setattr(files, "decode", lambda *args, **options: calls.append(1) or decode(*args, **options))

    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda start: split.batch(np.arange(start, start + 8), None), range(0, 64, 8)))

    assert len(calls) == 1
    assert torch.cat(batches).shape == (64, 3, 128, 128)


def test_the_store_keeps_to_its_bytes(tmp_path: Path) -> None:
    names = [picture(tmp_path / f"{index}.png", index, (10, 10)).name for index in range(6)]
    settings = ImageFolder(memory=1000)
    store = PictureStore(tmp_path, settings)
    splits = open_(tmp_path)
    known = {p.name: p for split in splits.named().values() for p in split._pictures}  # type: ignore[attr-defined]
    for name in names * 2:
        store.get(known[name])
    assert len(store._kept) == 2  # 400 bytes each
    assert store._bytes == 800


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / f"{index}.png", index)
    split = open_(tmp_path, memory=0).train
    first = split.batch(np.arange(2), None)
    assert torch.equal(first, split.batch(np.arange(2), None))


def test_reading_does_not_depend_on_what_is_kept_or_on_threads(tmp_path: Path) -> None:
    for index in range(12):
        picture(tmp_path / f"{index}.png", index, size=(50, 40))
    one, many = (open_(tmp_path, resize=30, memory=memory).train for memory in (0, 2**20))
    rows = [np.array([i, (i * 7) % 11]) for i in range(11)] * 3
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda chosen: many.batch(chosen, 1), rows))
    for chosen, batch in zip(rows, found, strict=True):
        assert torch.equal(batch, one.batch(chosen, 1))


def test_settings_that_do_not_change_values_stay_out_of_the_identity() -> None:
    assert ImageFolder(memory=5, max_unreadable=3).identity() == ImageFolder().identity()
    assert ImageFolder(tile=64).identity() != ImageFolder().identity()


def test_looking_is_reported(tmp_path: Path) -> None:
    classes(tmp_path, cat=3, dog=3)
    told: list[Any] = []

    class Listener(Silent):
        def begin(self, title: str, total: int, unit: str) -> None:
            told.append((title, total, unit))

        def advance(self, amount: int, samples: int, detail: str) -> None:
            told.append(threading.current_thread() is threading.main_thread())

        def end(self) -> None:
            told.append("end")

    ImageFolder(resize=None, crop=16).open(tmp_path, download=False, seed=0, progress=Listener())
    assert told == [("look at the pictures", 6, "pictures"), *[True] * 6, "end"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.crop=97"], "dataset: crop 97 must be 96 or less, as dataset.resize = 96"),
        (["dataset.resize=null", "dataset.tile=32"], "dataset: crop 64 must be 32 or less, as dataset.tile = 32"),
        (["dataset.mean=[1,2]"], r"dataset: mean \(1.0, 2.0\) must be one number or three"),
        (["dataset.std=[0.0]"], r"dataset: std \(0.0,\) must be above 0"),
        (["dataset.max_pixels=200000000"], "the nearest valid value is 178956970"),
    ],
)
def test_bad_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("images", overrides)


@pytest.mark.parametrize(
    ("overrides", "channels"),
    [
        ([], [128, 256, 512]),
        (["network.width=0.5"], [64, 128, 256]),
        (["network.cuts=[1,1,1,1,1,1]"], [128, 128, 256, 256, 512, 512]),
        (["network.cuts=[6]", "network.groups.2.channels=64"], [64]),
        (["network.patch=32", "network.patch_stride=16", "dataset.crop=128", "dataset.resize=144"], [128, 256, 512]),
    ],
)
def test_the_recipe_is_the_users_to_shape(overrides: list[str], channels: list[int]) -> None:
    recipe = load_recipe("images", overrides)
    side = recipe.dataset.crop  # type: ignore[attr-defined]
    modules = recipe.network.modules((3, side, side))
    assert [module.channels for module in modules] == channels


def test_training_and_probing_from_a_folder(tmp_path: Path, make_setup: Callable[..., Any]) -> None:
    """End to end on flat pictures of two colours, which a trained module tells apart."""
    from layerwise.pipeline.schedule import run_all

    for index in range(24):
        noise = np.random.default_rng(index).integers(0, 60, (24, 24, 3), np.uint8)
        noise[:, :, 2 * (index % 2)] += 150
        path = tmp_path / "pictures" / ("red", "blue")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    recipe = load_recipe(
        "images",
        [
            "dataset.resize=null",
            "dataset.crop=16",
            "network.patch=8",
            "network.patch_stride=4",
            "network.width=0.0625",
            "objective.steps=1",
            "objective.negatives=2",
            "training.batch_size=8",
            "training.epochs=1",
            "cache.dtype=float32",
        ],
    )
    setup = make_setup(recipe)
    setup.data_dir = tmp_path / "pictures"
    run_all(setup)

    from layerwise.pipeline.results import collect

    found = collect(setup)
    assert [probe["module"] for probe in found["probes"]] == [1, 2, 3]
    assert found["probes"][0]["tasks"]["class"]["trained"]["accuracy"] == 1.0
