"""What the parts of the cache benchmark share: the samples, and caches of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from activation_cache import SplitSpec, Storage, calibrate, create, make_key
from benchmarks.cache_peers import Array


@dataclass(frozen=True)
class Workload:
    name: str
    shape: tuple[int, ...]
    batch: int

    @property
    def sample_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))


WORKLOADS = (Workload("A", (49, 256, 16, 16), 16), Workload("B", (256, 16, 16), 16), Workload("C", (1024,), 1024))


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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
