"""Other stores, each at the best setting found for shuffled reading of whole samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from activation_cache.reading.order import epoch_order

Array = npt.NDArray[Any]
Epoch = Callable[[int], int]
"""Reads one shuffled epoch; returns how many samples that was."""

MOST_SAMPLES = 4096  # of small ones: some of these take minutes for what others do in a second


def peer_readers(work: Path, name: str, samples: Array, batch: int) -> dict[str, Epoch]:
    """Peer -> reader, for those that are installed."""
    few = samples[:MOST_SAMPLES]
    makers: dict[str, Callable[[Path, Array, int], Epoch]] = {
        "zarr-python": zarr_python,
        "zarrs": zarrs,
        "tensorstore": tensorstore,
        "HDF5": hdf5,
        "HF datasets": hf_datasets,
        "LitData": litdata,
        "MosaicML streaming": mosaic,
        "WebDataset": webdataset,
    }
    found = {}
    for peer, make in makers.items():
        try:
            found[peer] = make(work / f"{name}-{peer.replace(' ', '-')}", few, batch)
        except ImportError as error:
            print(f"{peer} is left out: {error}")
    return found


def _indexed(count: int, batch: int, fetch: Callable[[Any], Any]) -> Epoch:
    def epoch(number: int) -> int:
        order = epoch_order(count, 1, number)
        for at in range(0, count - batch + 1, batch):
            fetch(order[at : at + batch])
        return count // batch * batch

    return epoch


def _zarr_array(folder: Path, samples: Array) -> None:
    """One sample a chunk, uncompressed, with checksums: what zarr-python reads fastest."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    if not folder.exists():
        array = zarr.create_array(
            folder, shape=samples.shape, dtype=samples.dtype, chunks=(1, *samples.shape[1:]),
            serializer=BytesCodec(), compressors=[Crc32cCodec()], filters=None,
        )  # fmt: skip
        step = max(1, (64 << 20) // samples[0].nbytes)
        for at in range(0, len(samples), step):
            array[at : at + step] = samples[at : at + step]


def zarr_python(folder: Path, samples: Array, batch: int) -> Epoch:
    import zarr

    _zarr_array(folder, samples)
    array = zarr.open_array(folder, mode="r")
    return _indexed(len(samples), batch, lambda indices: array.oindex[np.sort(indices)])


def zarrs(folder: Path, samples: Array, batch: int) -> Epoch:
    import zarr
    import zarrs as _  # noqa: F401 - registers its pipeline

    _zarr_array(folder, samples)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(folder, mode="r")
    return _indexed(len(samples), batch, lambda indices: array.oindex[np.sort(indices)])


def tensorstore(folder: Path, samples: Array, batch: int) -> Epoch:
    import tensorstore as ts

    _zarr_array(folder, samples)
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}, read=True).result()
    return _indexed(len(samples), batch, lambda indices: array.oindex[indices].read().result())


def hdf5(folder: Path, samples: Array, batch: int) -> Epoch:
    import h5py

    path = folder.with_suffix(".h5")
    if not path.exists():
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=samples, chunks=(1, *samples.shape[1:]))
    array = h5py.File(path, "r")["x"]
    out = np.empty((batch, *samples.shape[1:]), samples.dtype)

    def fetch(indices: Any) -> None:
        for place, index in enumerate(indices.tolist()):
            array.read_direct(out, np.s_[index], np.s_[place])

    return _indexed(len(samples), batch, fetch)


def hf_datasets(folder: Path, samples: Array, batch: int) -> Epoch:
    import datasets

    if not folder.exists():
        flat = samples.reshape(len(samples), -1)
        features = datasets.Features({"x": datasets.Sequence(datasets.Value("float16"), length=flat.shape[1])})

        def rows() -> Any:
            for row in flat:
                yield {"x": np.asarray(row)}

        made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder.with_suffix(".tmp")))
        made.save_to_disk(str(folder))
    stored = datasets.load_from_disk(str(folder)).with_format("numpy")
    return _indexed(len(samples), batch, lambda indices: stored[indices]["x"])


def _loader(dataset: Any, count: int, batch: int) -> Epoch:
    from torch.utils.data import DataLoader

    def epoch(number: int) -> int:
        read = 0
        for got in DataLoader(dataset, batch_size=batch, num_workers=0):
            read += len(got[0] if isinstance(got, list | tuple) else got["x"] if isinstance(got, dict) else got)
        return read or count

    return epoch


def litdata(folder: Path, samples: Array, batch: int) -> Epoch:
    import litdata as ld
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for i, sample in enumerate(samples):
            writer[i] = np.asarray(sample)
        writer.done()
        writer.merge()
    return _loader(ld.StreamingDataset(str(folder), shuffle=True), len(samples), batch)


def mosaic(folder: Path, samples: Array, batch: int) -> Epoch:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    encoding = f"ndarray:float16:{','.join(map(str, samples.shape[1:]))}"
    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"x": encoding}) as writer:
            for sample in samples:
                writer.write({"x": np.ascontiguousarray(sample)})
    clean_stale_shared_memory()
    return _loader(StreamingDataset(local=str(folder), shuffle=True, batch_size=batch), len(samples), batch)


def webdataset(folder: Path, samples: Array, batch: int) -> Epoch:
    import webdataset as wds

    path = folder.with_suffix(".tar")
    if not path.exists():
        with tarfile.open(path, "w") as file:
            for i, sample in enumerate(samples):
                data = np.ascontiguousarray(sample).tobytes()
                entry = tarfile.TarInfo(f"{i:08d}.x")
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))
    shape = samples.shape[1:]
    pipeline = (
        wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
        .shuffle(64)
        .map(lambda sample: np.frombuffer(sample["x"], np.float16).reshape(shape))
    )
    return _loader(pipeline, len(samples), batch)
