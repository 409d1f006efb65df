"""Greedy InfoMax on any folder of pictures, with class sub-folders or without: --data-dir DIR.

A narrower, shallower network of the paper's kind, so that it trains on a modest machine. Make it your own with `--set`:

    network.width=2                            twice the channels everywhere
    network.patch=32 network.patch_stride=16   larger patches; a grid needs objective.steps + 2 rows
    network.cuts=[1,1,1,1,1,1]                 a module for each block
    network.groups.2.blocks=6                  a deeper third group
    dataset.resize=256 dataset.crop=224        larger pictures
    dataset.grayscale=true                     one channel
    dataset.tile=512 dataset.resize=null dataset.crop=256    windows of pictures too large to be a sample
"""

from __future__ import annotations

from layerwise.data.folder import ImageFolder
from layerwise.nets.resnet import Group, PatchResNet
from layerwise.objectives.infonce import PatchInfoNCE
from layerwise.recipe import CacheSettings, Optimiser, Probe, Recipe, Training

recipe = Recipe(
    name="images",
    dataset=ImageFolder(resize=96, crop=64),
    network=PatchResNet(
        patch=16,
        patch_stride=8,
        stem_channels=32,
        groups=(
            Group(channels=128, blocks=2),
            Group(channels=256, blocks=2, stride=2),
            Group(channels=512, blocks=2, stride=2),
        ),
    ),
    objective=PatchInfoNCE(steps=5, skip=1, negatives=16),
    optimiser=Optimiser(learning_rate=2e-4),
    training=Training(batch_size=32, epochs=100, patience=10, tolerance=1e-3),
    probe=Probe(learning_rates=(1e-3, 1e-2), epochs=300, standardise=True),
    cache=CacheSettings(dtype="float16"),
)
