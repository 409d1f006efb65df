"""How fast the activation cache reads, writes and feeds a training, and how small it gets, beside other stores.

    python -m benchmarks.cache [--work DIR] [--megabytes 512] [--repeats 5] [--peers] [--json FILE]

Samples are real activations: outputs of module 1 of the paper's network (as its seed makes it) for crops of the two
photographs that scikit-learn ships. Workload A: the module's output for one image, 49 x 256 x 16 x 16 in float16
(6.4 MB). B: for one patch (131 KB). C: means over space of four patches (2 KB). Each is read in shuffled epochs from
files in the page cache. *The practical limit* is a shuffled `np.take`, one thread, from a page-cached raw file
into a warm buffer; everything is a fraction of it, measured in turns with it, medians. Speeds count the bytes as
float16, whatever is stored. Beside wall time, the processor's time is compared (`cpu`): on a machine that does other
work meanwhile it is the sturdier of the two for readers of one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from activation_cache import SplitSpec, Storage, calibrate, create, make_key, open_cache
from activation_cache.order import epoch_order
from benchmarks.cache_peers import Array, Epoch, peer_readers
from benchmarks.machine import in_words, machine


@dataclass(frozen=True)
class Workload:
    name: str
    shape: tuple[int, ...]
    batch: int

    @property
    def sample_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))


WORKLOADS = (Workload("A", (49, 256, 16, 16), 16), Workload("B", (256, 16, 16), 16), Workload("C", (1024,), 1024))

STORAGES = (Storage("float16"), Storage("float16", "lz4"), Storage("uint8", "lz4"), Storage("uint8", "zstd"))


def activations(images: int) -> Iterator[Array]:
    """Module 1's outputs (49, 256, 16, 16) float16, one image at a time; on a GPU where there is one."""
    from sklearn.datasets import load_sample_images

    from layerwise.nets.resnet import Group, PatchResNet

    torch.manual_seed(0)
    network = PatchResNet(patch=16, patch_stride=8, stem_channels=64, groups=(Group(channels=256, blocks=3),))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = network.modules((1, 64, 64))[0].to(device).eval()
    rng = np.random.default_rng(0)
    pictures = [picture.mean(axis=2) / 255 for picture in load_sample_images().images]
    for _ in range(images):
        picture = pictures[rng.integers(len(pictures))]
        top, left = (rng.integers(0, size - 64) for size in picture.shape)
        crop = picture[top : top + 64, left : left + 64][:, :: rng.choice([-1, 1])]
        x = torch.from_numpy(((crop - 0.412) / 0.257)[None, None].astype(np.float32)).to(device)
        with torch.no_grad():
            yield module(x).output.relu().half().cpu().numpy().reshape(49, 256, 16, 16)


def make_raw(work: Path, megabytes: int) -> dict[str, Path]:
    """The raw file of each workload, about `megabytes` each."""
    raw = {workload.name: work / f"{workload.name}.raw" for workload in WORKLOADS}
    if all(path.exists() for path in raw.values()):
        return raw
    count = max(32, megabytes * 10**6 // WORKLOADS[0].sample_bytes)
    pooled = []
    with open(raw["A"], "wb") as file:
        for image in activations(count):
            image.tofile(file)
            pooled.append(image.astype(np.float32).mean(axis=(2, 3)))
    os.link(raw["A"], raw["B"])  # the same bytes, a patch a sample
    rng, patches = np.random.default_rng(1), np.concatenate(pooled).astype(np.float16)
    with open(raw["C"], "wb") as file:
        for _ in range(megabytes):
            patches[rng.integers(len(patches), size=(488, 4))].tofile(file)
    return raw


def write_cache(location: Path, samples: Array, storage: Storage) -> None:
    if location.exists():
        return
    some = samples[:: max(1, len(samples) // 512)].astype(np.float32)  # as many as a stage's cache is calibrated on
    # Channels: of A axis 1, behind the patches; of B axis 0; of C every feature is one.
    calibration = calibrate([some], channel_axis=samples.ndim - 1 - 3 if samples.ndim > 3 else 0)
    spec = SplitSpec("train", len(samples), samples.shape[1:])
    with create(
        location,
        make_key({}, storage),
        [spec],
        storage,
        calibration=calibration if storage.dtype == "uint8" else None,
    ) as writer:
        step = max(1, (64 << 20) // samples[0].nbytes)
        for at in range(0, len(samples), step):
            part = samples[at : at + step]
            writer.append("train", part, [str(i) for i in range(at, at + len(part))])
        writer.commit()


def limit_reader(samples: Array, batch: int) -> Epoch:
    out = np.empty((batch, *samples.shape[1:]), samples.dtype)

    def epoch(number: int) -> int:
        order = epoch_order(len(samples), 1, number)
        for at in range(0, len(order) - batch + 1, batch):
            np.take(samples, order[at : at + batch], axis=0, out=out, mode="clip")
        return len(order) // batch * batch

    return epoch


def memmap_reader(samples: Array, batch: int) -> Epoch:
    """One by one into a warm buffer, as a hand-written loader would."""
    out = np.empty((batch, *samples.shape[1:]), samples.dtype)

    def epoch(number: int) -> int:
        order = epoch_order(len(samples), 1, number)
        for at in range(0, len(order) - batch + 1, batch):
            for place, index in enumerate(order[at : at + batch].tolist()):
                out[place] = samples[index]
        return len(order) // batch * batch

    return epoch


def cache_reader(location: Path, batch: int, threads: int | None = None) -> Epoch:
    split = open_cache(location).splits["train"]
    return lambda number: sum(len(b) for b in split.batches(batch, seed=1, epoch=number, threads=threads))


def compare(limit: Epoch, readers: dict[str, Epoch], sample_bytes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Reader -> GB/s, and fractions of the limit's speed by wall and by processor time; medians.

    Each epoch of a reader follows one of the limit, and fractions are taken of such pairs: the speed of memory changes
    with whatever else the machine has just done.
    """
    pairs: dict[str, list[tuple[_Taken, _Taken]]] = {name: [] for name in readers}
    for repeat in range(-1, repeats):
        for name, epoch in readers.items():
            pair = _timed(limit, repeat + 1), _timed(epoch, repeat + 1)
            if repeat >= 0:  # the first epoch warms up, and checks checksums
                pairs[name].append(pair)
    limits = [first.wall for found in pairs.values() for first, _ in found]
    speeds = {
        "limit": {"gb_per_s": sample_bytes / statistics.median(limits) / 1e9, "of_limit": 1.0, "of_limit_cpu": 1.0}
    }
    for name, found in pairs.items():
        speeds[name] = {
            "gb_per_s": sample_bytes / statistics.median(reader.wall for _, reader in found) / 1e9,
            "of_limit": statistics.median(first.wall / reader.wall for first, reader in found),
            "of_limit_cpu": statistics.median(first.processor / reader.processor for first, reader in found),
        }
    return speeds


class _Taken(NamedTuple):
    """Seconds a sample."""

    wall: float
    processor: float


def _timed(epoch: Epoch, number: int) -> _Taken:
    wall, processor = time.perf_counter(), time.process_time()
    samples = epoch(number)
    return _Taken((time.perf_counter() - wall) / samples, (time.process_time() - processor) / samples)


def reading(work: Path, raw: dict[str, Path], repeats: int, peers: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for workload in WORKLOADS:
        whole = np.memmap(raw[workload.name], np.float16, "r")
        samples: Array = whole.reshape(-1, *workload.shape)
        limit = limit_reader(samples, workload.batch)
        readers = {"memmap": memmap_reader(samples, workload.batch)}
        stores = {}
        for storage in STORAGES:
            name = f"{storage.dtype}+{storage.codec}"
            location = work / f"{workload.name}-{name}"
            write_cache(location, samples, storage)
            readers[f"cache {name}"] = cache_reader(location, workload.batch)
            stores[name] = sizes(location, samples)
        speeds = compare(limit, readers, workload.sample_bytes, repeats)
        if peers:
            # Made and read after ours: several leave threads behind.
            theirs = peer_readers(work, workload.name, samples, workload.batch)
            speeds |= {**compare(limit, theirs, workload.sample_bytes, repeats), "limit": speeds["limit"]}
        found[workload.name] = {"speeds": speeds, "stores": stores}
        for name, speed in speeds.items():
            say(f"{workload.name}  {name:28s} {speed['gb_per_s']:7.2f} GB/s  {speed['of_limit']:5.2f} of the limit"
                f"  ({speed['of_limit_cpu']:5.2f} by processor time)")  # fmt: skip
        for name, store in stores.items():
            say(f"{workload.name}  {name:28s} {store['ratio']:.3f} of the float16 bytes, error {store['error']:.1e}")
    return found


def sizes(location: Path, samples: Array) -> dict[str, float]:
    """Bytes on disk over those of float16, and the relative L2 error, on some samples."""
    cache = open_cache(location)
    split = cache.splits["train"]
    some = np.arange(0, len(samples), max(1, len(samples) // 32))
    values = split.read(some)
    assert isinstance(values, np.ndarray)
    exact = samples[some].astype(np.float32)
    error = np.linalg.norm(split.dequantise(values) - exact) / np.linalg.norm(exact)
    return {"ratio": cache.nbytes / samples.nbytes, "error": float(error)}


def writing(work: Path, raw: dict[str, Path], repeats: int) -> dict[str, float]:
    """Seconds of: the forward pass alone, a raw write alone, and both through the cache's writer; and the ratio of the
    last to the longer of the others, the median over rounds in which each had its turn.
    """
    keep_freed_memory()
    count = 240  # 1.5 GB: enough that the last shard, which nothing overlaps, weighs little
    samples: Array = np.memmap(raw["A"], np.float16, "r").reshape(-1, *WORKLOADS[0].shape)
    kept = np.array(samples)
    storage = Storage("float16")
    target = work / "written"
    seconds: dict[str, list[float]] = {"forward": [], "raw write": [], "cache": []}

    def forward() -> None:
        for _ in activations(count):
            pass

    def raw_write() -> None:
        with open(work / "raw-written", "wb", buffering=0) as file:
            for i in range(count):
                file.write(kept[i % len(kept)].data)
            os.fsync(file.fileno())

    def cache() -> None:
        spec = SplitSpec("train", count, WORKLOADS[0].shape)
        threads = 1 if torch.cuda.is_available() else 0
        with create(target, make_key({}, storage), [spec], storage, threads=threads) as writer:
            for i, sample in enumerate(activations(count)):
                writer.append("train", sample[None], [str(i)])
            writer.commit()

    for repeat in range(-1, repeats):
        for name, work_of in (("forward", forward), ("raw write", raw_write), ("cache", cache)):
            (work / "raw-written").unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.sync()  # a disk that is told of the blocks that became free takes its time over it
            began = time.perf_counter()
            work_of()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rounds = zip(seconds["forward"], seconds["raw write"], seconds["cache"], strict=True)
    medians["ratio"] = statistics.median(cached / max(alone, raw) for alone, raw, cached in rounds)
    say(f"writing: forward {medians['forward']:.2f} s, raw write {medians['raw write']:.2f} s, both through the cache "
        f"{medians['cache']:.2f} s: {medians['ratio']:.2f} of the longer")  # fmt: skip
    return medians


def keep_freed_memory() -> None:
    """Keeps what is freed, where the C library is glibc: giving pages back to the system and getting new ones makes
    the same forward pass take up to twice as long, and it is chance which of two passes does.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def training(work: Path, raw: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Samples a second of two trainings from the cache, over those from memory.

    A convolution that does little to its inputs, on B, where the feed matters; and the paper's module 2 as the recipe
    stl10 trains it, on A.
    """
    patches: Array = np.memmap(raw["B"], np.float16, "r").reshape(-1, *WORKLOADS[1].shape)[:512]
    images: Array = np.memmap(raw["A"], np.float16, "r").reshape(-1, *WORKLOADS[0].shape)[:32]
    return {
        "a small module": _trained(work / "B-training", patches, 32, _small_step(), repeats),
        "the paper's module 2": _trained(work / "A-training", images, 16, _module_2_step(), max(3, repeats // 2)),
    }


def _trained(
    location: Path, samples: Array, batch: int, step: Callable[[torch.Tensor], None], repeats: int
) -> dict[str, float]:
    in_memory = torch.from_numpy(np.array(samples))
    write_cache(location, np.array(samples), Storage("float16"))
    split = open_cache(location).splits["train"]

    def from_memory(epoch: int) -> None:
        order = torch.from_numpy(epoch_order(len(samples), 1, epoch))
        for at in range(0, len(order) - batch + 1, batch):
            step(in_memory[order[at : at + batch]])

    def from_cache(epoch: int) -> None:
        for some in split.batches(batch, seed=1, epoch=epoch):
            step(torch.from_numpy(some.values))

    seconds: dict[str, list[float]] = {"memory": [], "cache": []}
    for repeat in range(-1, repeats):
        for name, run in (("memory", from_memory), ("cache", from_cache)):
            began = time.perf_counter()
            run(repeat + 1)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["ratio"] = medians["memory"] / medians["cache"]
    say(f"training {location.name}: from the cache {medians['ratio']:.2f} of the speed from memory")
    return medians


def _small_step() -> Callable[[torch.Tensor], None]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(256, 16, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
    optimiser = torch.optim.Adam(model.parameters())

    def step(x: torch.Tensor) -> None:
        optimiser.zero_grad()
        model(x.float()).square().mean().backward()
        optimiser.step()

    return step


def _module_2_step() -> Callable[[torch.Tensor], None]:
    from layerwise.feeds import Batch
    from layerwise.recipe_loader import load_recipe
    from layerwise.seeding import seeded
    from layerwise.setup import make_learner
    from layerwise.step import Arithmetic, train_step

    recipe, device = load_recipe("stl10"), torch.device("cpu")
    with seeded(0, "modules"):
        module = recipe.network.modules((1, 64, 64))[1]
    learner = make_learner(recipe, 2, module, (1, 64, 64), {}, device)
    arithmetic = Arithmetic(device, "fp32", None, 0)

    def step(x: torch.Tensor) -> None:
        train_step([learner], Batch(x, decode=torch.Tensor.float), 0, arithmetic)

    return step


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    reading, writing = found["reading"], found["writing"]
    names = list(dict.fromkeys(name for workload in reading.values() for name in workload["speeds"]))
    lines = [
        f"{in_words(found['machine'])}; {found['megabytes']} MB of each workload, page cache warm, "
        f"medians of {found['repeats']} shuffled epochs taken in turns. Samples of 6.4 MB (A), 131 KB (B), 2 KB (C). "
        "GB/s of float16, and the fraction of the limit: a gather by one thread from a raw file into a warm buffer.",
        "",
        "| reader | A: GB/s | of the limit | B: GB/s | of the limit | C: GB/s | of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        cells = []
        for workload in reading.values():
            speed = workload["speeds"].get(name)
            cells += ["–", "–"] if speed is None else [f"{speed['gb_per_s']:.2f}", f"{speed['of_limit']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| store | A: bytes | error | B: bytes | error | C: bytes | error |", "| --- |" + " ---: |" * 6]
    for name in next(iter(reading.values()))["stores"]:
        stores = [workload["stores"][name] for workload in reading.values()]
        lines.append(f"| {name} | " + " | ".join(f"{one['ratio']:.3f} | {one['error']:.1e}" for one in stores) + " |")
    lines += [
        "",
        "Bytes are relative to float16; errors are relative L2 norms.",
        "",
        *(
            f"- Training {name} from the cache: {one['ratio']:.3f} of the samples a second from memory."
            for name, one in found["training"].items()
        ),
        f"- Writing A: {writing['ratio']:.3f} of the longer of the forward pass alone ({writing['forward']:.2f} s) and "
        f"the raw write alone ({writing['raw write']:.2f} s).",
    ]
    return "\n".join(lines) + "\n"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a directory for the files; kept, so that a second run is quicker")
    parser.add_argument("--megabytes", type=int, default=512, help="of each workload")
    parser.add_argument("--repeats", type=int, default=5, help="epochs that are timed")
    parser.add_argument("--peers", action="store_true", help="other stores too: pip install 'layerwise[bench]'")
    parser.add_argument("--json", type=Path, help="where to write the figures, and beside them a page of them (.md)")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="cache-benchmark-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        raw = make_raw(work, options.megabytes)
        found = {
            "machine": machine(),
            "megabytes": options.megabytes,
            "repeats": options.repeats,
            "reading": reading(work, raw, options.repeats, options.peers),
            "training": training(work, raw, options.repeats),
            "writing": writing(work, raw, 2 * options.repeats),
        }
    finally:
        if options.work is None:
            shutil.rmtree(work)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
        options.json.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
