"""A ResNet-18 of half the width, on pictures in folders, module by module: does each module help?

    python -m benchmarks.own_network --data-dir DIR --out DIR [--pictures 10000] [--epochs 2]

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg, such as CIFAR-10's pictures. The network is torchvision's, of half
the width; nothing of it is made for this toolkit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import v2

import layerwise as lw
from benchmarks.machine import in_words, machine
from layerwise.recipe import Optimiser


def half_resnet18() -> nn.Module:
    """Torchvision's blocks, with 32 to 256 channels instead of 64 to 512."""

    def group(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        return nn.Sequential(BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs))

    stem = nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    layers = {
        f"layer{n}": group(*sizes) for n, sizes in enumerate([(32, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2)], 1)
    }
    network = nn.Sequential()
    for name, module in {"stem": stem, **layers}.items():
        network.add_module(name, module)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the run and the figures go")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    asked = parser.parse_args()
    began = time.perf_counter()
    told = machine()

    pixels = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)]
    augmented = v2.Compose(
        [v2.Resize(72), v2.RandomCrop(64), v2.RandomHorizontalFlip(), v2.RandomGrayscale(0.25), *pixels]
    )
    plain = v2.Compose([v2.Resize(72), v2.CenterCrop(64), *pixels])

    def pictures(part: str, transform: v2.Compose, count: int, begin: int = 0) -> Subset[ImageFolder]:
        every = ImageFolder(asked.data_dir / part, transform)
        order = np.random.default_rng(0).permutation(len(every))[begin : begin + count]
        return Subset(every, order.tolist())

    torch.manual_seed(0)
    run = lw.train(
        lw.split(half_resnet18(), at=["layer2", "layer3", "layer4"]),
        lw.PatchInfoNCE(steps=3),
        pictures("train", augmented, asked.pictures),
        pictures("test", plain, 500, begin=2000),
        to=asked.out / "run",
        patches=(16, 8),
        optimiser=Optimiser(learning_rate=1e-3),
        epochs=asked.epochs,
        batch_size=32,
        workers=2,
    )
    labelled, test = pictures("train", plain, 2000), pictures("test", plain, 2000)
    probes = {module: run.probe(module, train=labelled, test=test)["class"] for module in (1, 2, 3, 4)}
    minutes = (time.perf_counter() - began) / 60
    found = {"machine": told, "pictures": asked.pictures, "epochs": asked.epochs, "minutes": minutes, "probes": probes}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "own_network.json").write_text(json.dumps(found, indent=1))
    lines = [
        f"{in_words(told)}; {asked.pictures:,} pictures, {asked.epochs} epochs a module, {minutes:.1f} minutes",
        "",
    ]
    lines += ["| module | trained, % | untrained, % |", "| --- | ---: | ---: |"]
    lines += [f"| {n} | {100 * one['trained']:.1f} | {100 * one['untrained']:.1f} |" for n, one in probes.items()]
    (asked.out / "own_network.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
