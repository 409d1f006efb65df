"""Representations of files equal those of the same files in the dataset: what caches and probes hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import layerwise as lw
import layerwise.pipeline.embed
from layerwise.data.dataset import Split
from layerwise.data.digits import Digits
from layerwise.data.folder import ImageFolder
from layerwise.data.speech import Speech
from layerwise.data.stl10 import STL10
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.pipeline.caching import write_cache
from layerwise.pipeline.embed import Embeddings, embed_files, write_embeddings
from layerwise.pipeline.export import export_encoder, frozen_encoder
from layerwise.pipeline.inputs import nearest_inputs
from layerwise.pipeline.probe import features
from layerwise.pipeline.run import open_run
from layerwise.pipeline.setup import Setup
from tests.conftest import TINY
from tests.data.test_folder import picture
from tests.data.test_stl10 import write as write_stl10
from tests.test_export import frozen
from tests.test_speech_run import TINY as SPEECH
from tests.test_train import small


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    )


def run_of(folder: Path, data: Path | None, recipe: Any, **changes: Any) -> Setup:
    return frozen(Setup(open_run(folder, recipe.model_copy(update=changes)), torch.device("cpu"), data))


def represented(setup: Setup, number: int, split: Split) -> Tensor:
    """What the frozen modules make of a split's samples, one at a time, in the evaluation view: (N, C)."""
    encoder = frozen_encoder(setup, number)
    samples = [split.batch(np.array([index]), None) for index in range(len(split))]
    with torch.no_grad():
        return torch.cat([encoder(x).flatten(2).mean(2) for x in samples])


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Pictures of several formats and sizes in two folders."""
    for index, (suffix, size) in enumerate(
        [("png", (20, 16)), ("jpg", (64, 90)), ("png", (33, 47)), ("webp", (40, 21))] * 4
    ):
        picture(tmp_path / "data" / f"{index % 2}" / f"{index}.{suffix}", index, size)
    return tmp_path / "data"


@pytest.mark.parametrize("settings", [{}, {"grayscale": False}, {"resize": None}, {"tile": 18, "resize": None}])
def test_pictures_of_a_folder(settings: dict[str, Any], photographs: Path, tmp_path: Path) -> None:
    chosen = {"resize": 18, "crop": 16, "grayscale": True, "labelled": True, **settings}
    training = TINY.training.model_copy(update={"batch_size": 4})
    setup = run_of(tmp_path / "run", photographs, TINY, dataset=ImageFolder(**chosen), training=training)
    write_cache(setup, 1)
    for name in ("validation", "test"):
        split = setup.splits.named()[name]
        files = list(dict.fromkeys(photographs / id_.partition("@")[0] for id_ in split.ids))
        found = embed_files(setup, 2, files)
        assert [str(photographs / id_) for id_ in split.ids] == list(found.values)
        assert same(found.stacked(), represented(setup, 2, split))
    probed = features(nearest_inputs(setup, 2, ["validation"]), frozen_encoder(setup, 2).stages[1], "validation",
                      setup.device, tmp_path)  # fmt: skip
    split = setup.splits.validation
    files = list(dict.fromkeys(photographs / id_.partition("@")[0] for id_ in split.ids))
    assert same(embed_files(setup, 2, files).stacked(), probed["class"].features)  # read from the cache of module 1


def test_pictures_of_stl10(tmp_path: Path) -> None:
    write_stl10(tmp_path / "data" / "stl10_binary")
    for grayscale, mean in ((True, (0.4,)), (False, (0.4, 0.5, 0.6))):
        dataset = STL10(crop=64, grayscale=grayscale, mean=mean, std=mean)
        setup = run_of(tmp_path / f"run-{grayscale}", tmp_path / "data", TINY, dataset=dataset)
        split = setup.splits.test
        assert split is not None
        files = []
        for index, pixels in enumerate(np.load(tmp_path / "data" / "test.npy")):
            files.append(tmp_path / f"{index}.png")
            Image.fromarray(pixels).save(files[-1])
        assert same(embed_files(setup, 3, files).stacked(), represented(setup, 3, split))


def test_digits(make_setup: Callable[..., Setup], tmp_path: Path) -> None:
    setup = frozen(make_setup())
    split = setup.splits.validation
    files = []
    for index, pixels in enumerate(split.pictures):  # type: ignore[attr-defined]
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels[0]).save(files[-1])
    assert same(embed_files(setup, 3, files).stacked(), represented(setup, 3, split))


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """Recordings of several lengths, rates and channels, by two speakers."""
    draw = np.random.default_rng(0)
    for index in range(12):
        rate, channels = ((16_000, 1), (8_000, 2), (44_100, 1))[index % 3]
        path = tmp_path / "data" / f"speaker{index % 2}" / f"{index}.{('flac', 'wav', 'ogg')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, draw.normal(0, 0.05, (rate // 2 + 7 * index, channels)), rate)
    return tmp_path / "data"


def test_recordings(talk: Path, tmp_path: Path) -> None:
    setup = run_of(tmp_path / "run", talk, SPEECH, dataset=Speech(window=8000))
    write_cache(setup, 5)
    for name, number in (("probe", 3), ("test", 6)):
        split = setup.splits.named()[name]
        found = embed_files(setup, number, [talk / id_ for id_ in split.ids])
        assert same(found.stacked(), represented(setup, number, split))
    whole = embed_files(setup, 6, [talk / id_ for id_ in split.ids], positions=True)
    assert len({value.shape[1] for value in whole.values.values()}) > 1
    for value, mean in zip(whole.values.values(), found.values.values(), strict=True):
        assert same(value.mean(1), mean)


def test_recordings_as_long_as_a_window_are_what_the_cache_holds(tmp_path: Path) -> None:
    data, draw = tmp_path / "data", np.random.default_rng(0)
    for index in range(8):
        path = data / f"speaker{index % 2}" / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, draw.normal(0, 0.05, 8000), 16_000)
    setup = run_of(tmp_path / "run", data, SPEECH, dataset=Speech(window=8000, validation=0.4))
    write_cache(setup, 2)
    split = setup.splits.validation
    found = embed_files(setup, 2, [data / id_ for id_ in split.ids], positions=True)
    cached = torch.from_numpy(np.stack(lw.open_cache(setup, 2).splits["validation"].read(range(len(split)))))
    assert same(found.stacked(), cached.float())


def read_back(file: Path) -> tuple[list[str], Any]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            ids = json.loads(opened.metadata()["layerwise"])["ids"]
        return ids, load_file(file)
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return arrays["ids"].tolist(), {name: torch.from_numpy(arrays[name]) for name in arrays if name != "ids"}
    table = parquet.read_table(file)
    assert json.loads(table.schema.metadata[b"layerwise"])["module"] == 3
    rows = table.to_pylist()
    values = [torch.tensor(row["representation"]).reshape(row.get("shape", [-1])) for row in rows]
    named = {str(index): value for index, value in enumerate(values)}
    return [row["id"] for row in rows], named if "shape" in rows[0] else {"representations": torch.stack(values)}


@pytest.mark.parametrize("suffix", layerwise.pipeline.embed.SUFFIXES)
def test_what_is_written_is_read_back(suffix: str, tmp_path: Path) -> None:
    values = {"a b.png": torch.randn(4), "ü.png": torch.randn(4)}
    write_embeddings(Embeddings(values, False, {"module": 3}), tmp_path / f"one{suffix}")
    ids, arrays = read_back(tmp_path / f"one{suffix}")
    assert ids == list(values)
    assert torch.equal(arrays["representations"], torch.stack(list(values.values())))
    values = {"file": torch.randn(4, 7), "allow_pickle": torch.randn(4, 3)}
    write_embeddings(Embeddings(values, True, {"module": 3}), tmp_path / f"many{suffix}")
    ids, arrays = read_back(tmp_path / f"many{suffix}")
    assert ids == list(values)
    assert all(torch.equal(arrays[str(index)], value) for index, value in enumerate(values.values()))


def test_what_cannot_be_embedded_is_said(
    make_setup: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = picture(tmp_path / "good.png")
    setup = make_setup()
    with pytest.raises(NotReady, match="module 1 is not trained yet"):
        embed_files(setup, 1, [good])
    frozen(setup)
    (tmp_path / "bad.png").write_bytes(b"hello")
    for files, kind, message in (
        ([], UsageError, "name at least one"),
        ([tmp_path / "none.png"], UsageError, "there is no file"),
        ([tmp_path], UsageError, "is a folder: name the files in it"),
        ([good, good], UsageError, "is named twice"),
        ([good, tmp_path / "bad.png"], DamagedData, "bad.png cannot be read as a picture: in no format"),
    ):
        with pytest.raises(kind, match=message):
            embed_files(setup, 1, files)
    with pytest.raises(UsageError, match="there is no module 4"):
        embed_files(setup, 4, [good])
    found = embed_files(setup, 1, [good])
    with pytest.raises(UsageError, match=r"must end in .safetensors, .npz or .parquet"):
        write_embeddings(found, tmp_path / "a.csv")
    monkeypatch.setattr(layerwise.pipeline.embed, "find_spec", lambda name: None)
    with pytest.raises(NotReady, match=r"needs pyarrow, .* pip install 'layerwise\[parquet\]'"):
        write_embeddings(found, tmp_path / "a.parquet")
    run = small(tmp_path / "given")
    with pytest.raises(UsageError, match="GivenData does not say how a file becomes a sample"):
        run.embed([good])


@pytest.mark.parametrize("grayscale", [True, False])
def test_the_preprocessing_that_is_written_beside_an_encoder_is_all_it_takes(
    grayscale: bool, photographs: Path, tmp_path: Path
) -> None:
    dataset = ImageFolder(resize=18, crop=16, grayscale=grayscale)
    training = TINY.training.model_copy(update={"batch_size": 4})
    setup = run_of(tmp_path / "run", photographs, TINY, dataset=dataset, training=training)
    _ = setup.splits
    said = export_encoder(setup, 1, tmp_path / "encoder.safetensors").about["preprocessing"]
    size, shorter = said["centre_crop_pixels"], said["resize_shorter_side_pixels"]
    files = sorted(photographs.rglob("*.*"))
    inputs = []
    for file in files:
        with Image.open(file) as opened:
            while opened.format == "JPEG" and min(opened.size) >= 2 * shorter:
                opened.draft(None, (opened.width // 2, opened.height // 2))
            image = opened.convert("L" if said["channels"].startswith("brightness") else "RGB")
        k = max(shorter, size) / min(image.size)
        left, top = (max(round(side * k) - size, 0) // 2 / k for side in image.size)
        box = left, top, min(left + size / k, image.width), min(top + size / k, image.height)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box), np.float32)
        planes = torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1) / said["divide_by"]
        mean, std = (torch.tensor(said[name]).view(-1, 1, 1) for name in ("subtract_mean", "divide_by_std"))
        inputs.append((planes - mean) / std)
    with torch.no_grad():
        wanted = frozen_encoder(setup, 1)(torch.stack(inputs)).flatten(2).mean(2)
    assert same(embed_files(setup, 1, files).stacked(), wanted)


def test_a_bad_recording_is_named(talk: Path, tmp_path: Path) -> None:
    setup = run_of(tmp_path / "run", talk, SPEECH, dataset=Speech(window=8000))
    (tmp_path / "short.wav").write_bytes(b"")
    with pytest.raises(DamagedData, match=r"short.wav is empty"):
        embed_files(setup, 1, [tmp_path / "short.wav"])


def test_every_dataset_of_files_says_how_it_reads_them() -> None:
    for dataset in (Digits(), STL10(), ImageFolder(), Speech(), SPEECH.dataset):
        said = dataset.preprocessing()
        assert said is not None
        assert said["kind"] in ("image", "recording")
        json.dumps(said, allow_nan=False)
